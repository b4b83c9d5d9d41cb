"""Compiled layers equal plain ones and compile nothing anew, whatever comes; who decides."""

from __future__ import annotations

import copy
import shutil
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedbert_ds.errors import ConfigError
from fedbert_ds.model import compiled_layers
from fedbert_ds.model.compiled_layers import (
    AS_IS,
    COMPILED,
    LayerCase,
    check_compile,
    compile_layers,
    install_compile,
    num_compiled,
)
from fedbert_ds.model.cut import split
from fedbert_kernels import attention_choice, choice, sequences
from fedbert_kernels.attention import attention
from fedbert_kernels.attention_rivals import RIVALS, Rival
from fedbert_kernels.patch_modules import patch_modules

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WINDOWS = [([6, 5], 4), ([9, 7, 20], 5), ([50], 0), ([8, 8, 8], 24), ([2], 1), ([1, 1, 3, 30, 2], 7), ([64, 64, 11], 2)]
"""Sequence lengths, and how many positions are masked."""


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    """All layers run the same lines, of which a process compiles eight kinds and no more."""
    torch.compiler.reset()


@pytest.fixture
def body_of(small_model):
    """Builds a body in training, with heads of 16, the smallest that our attention takes."""

    def build(
        layers: int = 3,
        is_patched: bool = True,
        dropout: float = 0.0,
        width: int = 32,
        architecture: str = "bert",
        recomputed: Any = "none",
    ) -> Any:
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "initializer_range": 0.2, "dropout": dropout}
        _, body = split(small_model(architecture, **sizes).train(), "embeddings")
        body.recompute(recomputed)
        if is_patched:
            body.attend = attention
            patch_modules(body, "triton", recompute=body.recomputes_elementwise)
        return body

    return build


def run(body: Any, lengths: list[int], num_masked: int, device: torch.device = CPU) -> list[Tensor]:
    """Hidden states of masked positions, and the gradients of the input and of all parameters."""
    random = torch.Generator().manual_seed(sum(lengths))
    values = torch.randn(sum(lengths), 32, generator=random).to(device).requires_grad_()
    masked = torch.randperm(sum(lengths), generator=random)[:num_masked].sort().values.to(device)
    torch.manual_seed(0)
    hidden = body(values, masked, torch.tensor([0, *lengths]).cumsum(0).int())
    weights = torch.randn(hidden.shape, generator=random).to(device)
    return [hidden.detach(), *torch.autograd.grad(hidden, [values, *body.parameters()], weights)]


def look(*_: object) -> None:
    raise AssertionError("on a GPU, this waits for the device")


def graphs_compiled(compiled: Any, plain: Any, device: torch.device = CPU) -> int:
    """Graphs compiled in the first window; in the others there must be none, and all are right."""
    before, after_first = num_compiled(), None
    for lengths, num_masked in WINDOWS:
        found, expected = run(compiled, lengths, num_masked, device), run(plain, lengths, num_masked, device)
        assert [one.shape for one in found] == [one.shape for one in expected]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        after_first = num_compiled() if after_first is None else after_first
        assert num_compiled() == after_first, (lengths, num_masked)
    assert after_first is not None
    return after_first - before


def test_no_window_compiles_anything_after_the_first_and_all_are_right(body_of, monkeypatch) -> None:
    """One code serves all layers but the last, which the hook for masked positions is on."""
    monkeypatch.setattr(sequences, "read_bounds", look)
    plain = body_of(layers=4)
    compiled = copy.deepcopy(plain)
    compile_layers(compiled, backend="aot_eager")
    assert 1 <= graphs_compiled(compiled, plain) <= 2


@pytest.mark.parametrize("is_patched", [True, False])
def test_compiled_layers_stand_in_for_recomputed_ones(body_of, is_patched: bool) -> None:
    """The last layer, which is not compiled, goes on computing again."""
    plain = body_of(layers=4, is_patched=is_patched)
    compiled = body_of(layers=4, is_patched=is_patched, recomputed="elementwise")
    plain.attend = compiled.attend = attention
    compile_layers(compiled, backend="aot_eager")
    assert 1 <= graphs_compiled(compiled, plain) <= 2


def test_layers_of_modernbert_compile_once_a_kind(body_of, monkeypatch) -> None:
    """The first has no LayerNorm, and others see windows."""
    monkeypatch.setattr(sequences, "read_bounds", look)
    plain = body_of(layers=5, architecture="modernbert")
    compiled = copy.deepcopy(plain)
    compile_layers(compiled, backend="aot_eager")
    assert 3 <= graphs_compiled(compiled, plain) <= 6


def test_dropout_of_compiled_layers_follows_the_seed(body_of) -> None:
    body = body_of(dropout=0.3)
    compile_layers(body, backend="aot_eager")
    first, again = run(body, [9, 7], 5), run(body, [9, 7], 5)
    assert all(map(torch.equal, first, again))
    body.eval()
    assert not torch.equal(run(body, [9, 7], 5)[0], first[0])


def is_compiled(body: Any) -> list[bool]:
    return [vars(layer).get("_compiled_call_impl") is not None for layer in body.layers]


@pytest.fixture
def answered(monkeypatch) -> list[Any]:
    """Cases that a measurement is asked for; the list's first entry is its answer."""
    asked: list[Any] = [COMPILED]

    def kept(cases: Any, device: torch.device) -> dict[str, str]:
        asked.extend(cases)
        return {case.name: asked[0] for case in cases}

    monkeypatch.setattr(choice, "kept", kept)
    return asked


def test_auto_goes_by_the_measurement_of_a_layer(body_of, answered) -> None:
    body = body_of()
    assert install_compile(body, "auto", torch.bfloat16, 300)
    (case,) = answered[1:]
    assert (case.layer, case.attend, case.dtype, case.longest) == (
        body.layers[0],
        attention,
        torch.bfloat16,
        300,
    )
    assert is_compiled(body) == [True, True, False]
    assert not case.is_recomputed
    assert install_compile(body_of(recomputed="elementwise"), "auto", torch.bfloat16, 300)
    assert answered[-1].is_recomputed and answered[-1].name != case.name
    answered[0] = AS_IS
    body = body_of()
    assert not install_compile(body, "auto", torch.bfloat16)
    assert answered[-1].longest == body.config.max_position_embeddings
    assert not any(is_compiled(body))


def test_on_a_cpu_auto_compiles_nothing_and_true_takes_attention_as_one_operator(body_of) -> None:
    for body in (body_of(), body_of(is_patched=False)):
        attend = body.attend
        assert not install_compile(body, "auto", torch.float32)
        assert not install_compile(body, False, torch.float32)
        assert body.attend is attend and not any(is_compiled(body))
        assert install_compile(body, True, torch.float32)
        assert body.attend is attention and is_compiled(body) == [True, True, False]


def test_auto_leaves_modernbert_as_it_is_and_true_compiles_it(body_of, answered) -> None:
    body = body_of(architecture="modernbert")
    assert not install_compile(body, "auto", torch.bfloat16, 300) and answered == [COMPILED]
    assert install_compile(body, True, torch.bfloat16, 300) and is_compiled(body) == [True, True, False]


def test_a_single_layer_is_the_last_and_stays_as_it_is(body_of) -> None:
    body = body_of(layers=1)
    assert not install_compile(body, True, torch.float32)
    assert is_compiled(body) == [False]


def test_heads_that_attention_does_not_take_are_one_line(body_of) -> None:
    body = body_of(is_patched=False, width=16)
    assert not install_compile(body, "auto", torch.float32)
    with pytest.raises(ConfigError, match=r"body\.compile: true needs heads of 16 to 128"):
        install_compile(body, True, torch.float32)


@pytest.mark.parametrize("rival", RIVALS.values(), ids=RIVALS)
def test_attention_of_a_package_is_not_compiled_around(body_of, answered, rival: Rival) -> None:
    body = body_of()
    body.attend = rival.attend
    if not rival.module:
        assert install_compile(body, "auto", torch.bfloat16)
        return
    assert not install_compile(body, "auto", torch.bfloat16) and answered == [COMPILED]
    with pytest.raises(ConfigError, match=rf"and {rival.attend.__name__} is not, .*; set kernels: triton, or"):
        install_compile(body, True, torch.bfloat16)


def test_where_nothing_can_compile_it_is_one_line(monkeypatch) -> None:
    from fedbert_kernels import interpreter

    monkeypatch.setattr(interpreter, "HAVE_TRITON", True)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    for chosen in (False, "auto"):
        check_compile(chosen, "torch", CPU)
        check_compile(chosen, "torch", CUDA)
    check_compile(True, "auto", CUDA)
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler on a CPU; install g\\+\\+, or set auto"):
        check_compile(True, "auto", CPU)
    with pytest.raises(ConfigError, match="needs the triton package and kernels: auto or triton"):
        check_compile(True, "torch", CUDA)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    check_compile(True, "torch", CPU)


@pytest.fixture
def case(body_of, monkeypatch) -> LayerCase:
    monkeypatch.setattr(attention_choice, "typical_lengths", lambda longest: [longest, 7])
    compile_layer = partial(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", lambda self, dynamic: compile_layer(self, dynamic=dynamic))
    body = body_of(dropout=0.1)
    body.recompute("layers")
    return LayerCase(body.layers[0], body.attend, torch.float32, 20)


def test_a_timed_layer_is_a_copy_run_forward_and_backward(case) -> None:
    for way in (AS_IS, COMPILED):
        gradients = case.step(way, CPU)()
        assert gradients[0].shape == (1, 27, 32)
        assert len(gradients) == 1 + len(list(case.layer.parameters()))
    assert "_compiled_call_impl" not in vars(case.layer) and case.layer.gradient_checkpointing


def test_a_layer_that_computes_again_is_timed_doing_so(body_of, monkeypatch) -> None:
    monkeypatch.setattr(attention_choice, "typical_lengths", lambda longest: [longest, 7])
    body = body_of(recomputed="elementwise", is_patched=False)
    calls: list[nn.Module] = []
    forward = nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, values: calls.append(self) or forward(self, values))
    # No product takes the last LayerNorm's result, so that only the first is run again.
    for is_recomputed, expected in ((False, 2), (True, 3)):
        calls.clear()
        LayerCase(body.layers[0], attention, torch.float32, 20, is_recomputed).step(AS_IS, CPU)()
        assert len(calls) == expected


def test_a_layer_that_is_compiled_wrongly_is_not_timed(case, monkeypatch) -> None:
    def compile_wrongly(self: Any, dynamic: bool) -> None:
        forward = self.forward
        self.forward = lambda *arguments, **keywords: 1.1 * forward(*arguments, **keywords)

    monkeypatch.setattr(nn.Module, "compile", compile_wrongly)
    with pytest.raises(ValueError, match="its gradient is wrong"):
        case.step(COMPILED, CPU)


def test_a_case_is_known_by_all_that_decides_it(body_of) -> None:
    def name(body: Any, dtype: torch.dtype = torch.float32, longest: int = 128) -> str:
        return LayerCase(body.layers[0], body.attend, dtype, longest).name

    plain = body_of(is_patched=False)
    plain.attend = attention
    names = {name(body_of()), name(body_of(), torch.bfloat16), name(body_of(), longest=512), name(plain)}
    assert len(names | {name(body_of(width=64)), name(body_of(dropout=0.1))}) == 6


def test_counting_does_not_import_the_compiler(monkeypatch) -> None:
    monkeypatch.delitem(compiled_layers.sys.modules, "torch._dynamo.utils", raising=False)
    assert num_compiled() == 0


# ---- on hardware: needs a GPU --------------------------------------------------------------------

needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_card
@pytest.mark.timeout(600)
def test_on_a_card_no_window_compiles_anything_after_the_first(body_of, monkeypatch) -> None:
    monkeypatch.setattr(sequences, "read_bounds", look)
    plain = body_of(layers=4, is_patched=False).to(CUDA)
    plain.attend = attention
    patch_modules(plain, "triton")
    compiled = copy.deepcopy(plain)
    compile_layers(compiled)
    assert 1 <= graphs_compiled(compiled, plain, CUDA) <= 2


@needs_card
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", [AS_IS, COMPILED])
def test_on_a_card_a_layer_can_be_timed(body_of, way: str) -> None:
    body = body_of(width=128, dropout=0.1).to(CUDA)
    case = LayerCase(body.layers[0], attention, torch.bfloat16, 512)
    assert all(bool(gradient.isfinite().all()) for gradient in case.step(way, CUDA)())
