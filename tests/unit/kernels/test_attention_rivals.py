"""Other libraries' attention: called with the right arguments, and on a card right, repeatable and
seeded.

Without a card, a stand-in for each library binds its arguments by the library's own names and
computes by the reference. What needs the hardware is below the line that says so.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from unit.kernels.bounds import needs_triton

from fedbert_kernels import attention_torch
from fedbert_kernels.attention import attention, attention_reference
from fedbert_kernels.attention_choice import AttentionCase, attend_by, check_attention
from fedbert_kernels.attention_rivals import RIVALS, torch_flash
from fedbert_kernels.choice import kept
from fedbert_kernels.sequences import vouch_for_bounds

pytestmark = needs_triton

CPU = torch.device("cpu")
LENGTHS = [9, 1, 20]


def problem(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(qkv [30, 3, 2, 16], cu_seqlens)."""
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(sum(LENGTHS), 3, 2, 16, generator=generator).to(device, dtype)
    return qkv.requires_grad_(), torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)


def each_side(window: Any) -> int | None:
    left, right = window
    assert left == right
    return None if left in (-1, None) else left


class FlashInTorch:
    """CPU bodies of aten's two operators; backward drops by the state of its forward."""

    longest = max(LENGTHS)

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at_end: ExitStack) -> None:
        library = torch.library.Library("aten", "IMPL")
        for name in ("_flash_attention_forward", "_flash_attention_backward"):
            library.impl(name, getattr(self, name), "CPU")
        # What it registers goes with its last reference.
        at_end.callback(lambda _: None, library)

    def bound(self, names: str, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        bound = dict(zip(names.split(), given, strict=True)) | named
        assert bound["cum_seq_q"] is bound["cum_seq_k"] and bound["cum_seq_q"].dtype == torch.int32
        assert bound["max_q"] == bound["max_k"] == self.longest
        assert bound["is_causal"] is False and not bound.get("return_debug_mask")
        return bound

    def options(self, bound: dict[str, Any], state: Tensor) -> tuple[Any, ...]:
        side = each_side((bound.get("window_size_left"), bound.get("window_size_right")))
        dropout, seed = bound["dropout_p"], state.view(torch.int64)
        return bound["cum_seq_q"], seed if dropout else None, dropout, -1 if side is None else side, bound["scale"]

    def _flash_attention_forward(self, *given: Any, **named: Any) -> tuple[Tensor, ...]:
        bound = self.bound(f"query key value {BOUNDS} dropout_p is_causal return_debug_mask", given, named)
        state = torch.randint(2**31, (2,)).view(torch.uint64)
        out, lse = attention_torch.forward(*given[:3], *self.options(bound, state))
        return out, lse, state, torch.empty((), dtype=torch.uint64), torch.empty(0)

    def _flash_attention_backward(self, *given: Any, **named: Any) -> tuple[Tensor, ...]:
        bound = self.bound(f"{OF_BACKWARD} {BOUNDS} dropout_p is_causal rng_state unused", given, named)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        options = self.options(bound, bound["rng_state"])
        dout, *inputs, out, lse = (bound[name] for name in OF_BACKWARD.split())
        assert torch.equal(attention_torch.forward(*inputs, *options)[0], out), "another mask than the forward's"
        gradients = [torch.empty_like(part) for part in inputs]
        attention_torch.backward(dout, *inputs, out, lse, *gradients, *options)
        return tuple(gradients)


BOUNDS = "cum_seq_q cum_seq_k max_q max_k"
OF_BACKWARD = "grad_out query key value out logsumexp"
"""Names of torch's arguments, in its order."""


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Callable[..., Any]) -> None:
    """Install a package of this name."""
    parent, _, child = name.partition(".")
    package = ModuleType(parent)
    monkeypatch.setitem(sys.modules, parent, package)
    if child:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[name]).update(functions)


def flash_attn_2(monkeypatch: pytest.MonkeyPatch, _: ExitStack) -> None:
    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, dropout_p, softmax_scale,
               window_size, deterministic):  # fmt: skip
        assert deterministic and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k == max(LENGTHS)
        seed = torch.randint(2**31, (2,))
        return attention_reference(
            q, k, v, cu_seqlens_q, dropout=dropout_p, seed=seed, sliding_window=each_side(window_size),
            scale=softmax_scale,
        )  # fmt: skip

    def packed(qkv, cu_seqlens, max_seqlen, **options):
        return varlen(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)

    stand_in(monkeypatch, "flash_attn", flash_attn_varlen_qkvpacked_func=packed, flash_attn_varlen_func=varlen)


def flash_attn_3(monkeypatch: pytest.MonkeyPatch, _: ExitStack) -> None:
    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale, window_size,
               deterministic):  # fmt: skip
        assert deterministic and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k == max(LENGTHS)
        return attention_reference(
            q, k, v, cu_seqlens_q, sliding_window=each_side(window_size), scale=softmax_scale
        ), None  # fmt: skip

    stand_in(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=varlen)


def flash_attn_4(monkeypatch: pytest.MonkeyPatch, _: ExitStack) -> None:
    def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window_size,
               deterministic):  # fmt: skip
        assert window_size[0] != -1, "None is everything"
        assert deterministic and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k == max(LENGTHS)
        return attention_reference(
            q, k, v, cu_seqlens_q, sliding_window=each_side(window_size), scale=softmax_scale
        ), None  # fmt: skip

    stand_in(monkeypatch, "flash_attn.cute", flash_attn_varlen_func=varlen)


STAND_INS: dict[str, Callable[[pytest.MonkeyPatch, ExitStack], Any]] = {
    "FlashAttention-2 in torch": FlashInTorch,
    "flash-attn 2": flash_attn_2,
    "flash-attn 3": flash_attn_3,
    "flash-attn 4": flash_attn_4,
}


@pytest.fixture
def install(monkeypatch) -> Iterator[Callable[[str], None]]:
    """Puts a rival's stand-in where its library would be."""
    with ExitStack() as at_end:
        yield lambda way: STAND_INS[way](monkeypatch, at_end)


def test_every_rival_has_a_stand_in() -> None:
    assert STAND_INS.keys() == RIVALS.keys()


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"sliding_window": 0, "scale": 0.7}], ids=str)
@pytest.mark.parametrize("way", RIVALS)
def test_a_rival_gives_what_ours_gives(way: str, options: dict[str, Any], install) -> None:
    install(way)
    attend = attend_by(way)
    qkv, cu_seqlens = problem()
    dout = torch.randn(30, 2, 16)
    expected = attention(qkv, cu_seqlens, **options)
    (gradient,) = torch.autograd.grad(expected, qkv, dout)
    for inputs in (qkv, tuple(part.detach().requires_grad_() for part in qkv.unbind(1))):
        out = attend(inputs, cu_seqlens, **options)
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
        found = torch.autograd.grad(out, inputs if isinstance(inputs, tuple) else (inputs,), dout)
        stacked = found[0] if len(found) == 1 else torch.stack(found, 1)
        torch.testing.assert_close(stacked, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", [way for way, rival in RIVALS.items() if rival.has_dropout])
def test_dropout_follows_torch_s_seed_in_any_order_of_backwards(way: str, install) -> None:
    install(way)
    attend = attend_by(way)
    qkv, cu_seqlens = problem()
    dout = torch.randn(30, 2, 16)

    def forward(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return attend(qkv, cu_seqlens, dropout=0.3)

    def gradient(out: Tensor) -> Tensor:
        return torch.autograd.grad(out, qkv, dout)[0]

    alone = [gradient(forward(seed)) for seed in (1, 2)]
    both = [forward(1), forward(2)]
    torch.randn(5)  # what happens in between
    later = [gradient(out) for out in reversed(both)]
    assert torch.equal(later[1], alone[0]) and torch.equal(later[0], alone[1])
    assert not torch.equal(alone[0], alone[1])
    # As ZeRO 3 and activation checkpointing do.
    assert torch.equal(forward(1), both[0])


@pytest.mark.parametrize("way", [way for way, rival in RIVALS.items() if not rival.has_dropout])
def test_who_has_no_dropout_refuses_it(way: str, install) -> None:
    install(way)
    qkv, cu_seqlens = problem()
    with pytest.raises(ValueError, match="has no dropout"):
        attend_by(way)(qkv, cu_seqlens, dropout=0.1)


def test_torch_s_switch_for_repeatable_bits_is_left_as_it_was(install, monkeypatch) -> None:
    install("FlashAttention-2 in torch")
    qkv, cu_seqlens = problem()
    torch_flash(qkv, cu_seqlens, dropout=0.1).sum().backward()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory

    out = torch_flash(qkv, cu_seqlens)
    monkeypatch.setattr(FlashInTorch, "options", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        out.sum().backward()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_compilers_see_the_operators_as_they_are(install) -> None:
    install("FlashAttention-2 in torch")
    qkv, cu_seqlens = problem()
    q, k, v = (part.detach().requires_grad_() for part in qkv.unbind(1))
    arguments = (q, k, v, cu_seqlens, 0.0, -1, 0.25)
    torch.library.opcheck(
        torch.ops.fedbert_kernels.flash_attention.default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    compiled = torch.compile(torch_flash, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(qkv, cu_seqlens), torch_flash(qkv, cu_seqlens))


def test_the_longest_sequence_is_not_asked_of_the_device(install, monkeypatch) -> None:
    install("FlashAttention-2 in torch")
    qkv, cu_seqlens = problem()
    # On a GPU, to look at the bounds is to wait for the device.
    vouch_for_bounds(cu_seqlens, 30, 99)
    monkeypatch.setattr(FlashInTorch, "longest", 99)
    torch_flash(qkv, cu_seqlens).sum().backward()


def test_a_package_s_release_is_known(install, monkeypatch) -> None:
    rival = RIVALS["flash-attn 2"]
    install("flash-attn 2")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: {"flash-attn": "2.8.3"}[package])
    assert rival.release() == "2.8.3"
    assert RIVALS["FlashAttention-2 in torch"].release() == ""
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError):
        rival.release()


# ---- on hardware: needs a GPU --------------------------------------------------------------------

needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CARD = torch.device("cuda", 0)


@needs_card
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("way", ["ours", *RIVALS])
def test_on_a_card_it_is_right(way: str, dtype: torch.dtype, dropout: float) -> None:
    case = AttentionCase(dtype, 12, 64, dropout, 512)
    if reason := case.missing().get(way):
        pytest.skip(reason)
    if dtype == torch.float32 and way != "ours":
        pytest.skip("16 bits alone")
    check_attention(attend_by(way), 64, dtype, dropout, CARD)


@needs_card
@pytest.mark.parametrize("longest", [128, 512, 2048])
@pytest.mark.parametrize("way", ["ours", *RIVALS])
def test_on_a_card_a_step_of_a_measurement_runs_and_repeats(way: str, longest: int) -> None:
    case = AttentionCase(torch.bfloat16, 12, 64, 0.1, longest)
    if reason := case.missing().get(way):
        pytest.skip(reason)
    (gradient,) = case.step(way, CARD)()
    assert bool(gradient.isfinite().all())


@needs_card
def test_on_a_card_attention_is_chosen_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case = AttentionCase(torch.bfloat16, 12, 64, 0.1, 128)
    chosen = kept([case], CARD)
    monkeypatch.setattr(AttentionCase, "step", lambda *_: pytest.fail("measured again"))
    assert kept([case], CARD) == chosen and chosen[case.name] in case.releases()
