"""Which attention may run is a matter of being right; of the class of lengths; then of time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from unit.kernels.bounds import needs_triton

from fedbert_kernels import attention_choice
from fedbert_kernels.attention import attention
from fedbert_kernels.attention_choice import (
    CLASSES,
    AttentionCase,
    attend_by,
    check_attention,
    length_class,
    typical_lengths,
)
from fedbert_kernels.attention_rivals import RIVALS, Rival
from fedbert_kernels.choice import OURS, kept

pytestmark = needs_triton

CPU = torch.device("cpu")
CASE = AttentionCase(torch.float32, 2, 16, 0.1, 100)


@pytest.mark.parametrize(
    ("longest", "name"),
    [(1, "up to 128"), (128, "up to 128"), (129, "up to 512"), (512, "up to 512"), (2048, "up to 2048"),
     (2049, "above 2048"), (100_000, "above 2048")],
)  # fmt: skip
def test_a_class_of_lengths_reaches_up_to_its_bound(longest: int, name: str) -> None:
    assert length_class(longest) == name
    assert CASE.name != AttentionCase(torch.float32, 2, 16, 0.1, 129).name


@pytest.mark.parametrize("longest", [1, 128, 129, 512, 2048, 2049])
def test_lengths_of_a_measurement_are_those_of_its_class(longest: int) -> None:
    lengths = typical_lengths(longest)
    bound = next((bound for bound in CLASSES if longest <= bound), 4096)
    assert max(lengths) == bound and min(lengths) >= 1
    assert lengths.count(bound) * 2 == len(lengths)
    assert 4096 <= sum(lengths) <= max(8192, 2 * bound)
    assert lengths == typical_lengths(bound), "one class, one measurement"
    ends = {length for length in lengths if length < bound}
    assert len(ends) == min(8, len(lengths) // 2), "ends of any length"


def test_a_case_is_known_by_all_that_decides_it() -> None:
    cases = [
        AttentionCase(dtype, heads, size, dropout, longest)
        for dtype in (torch.bfloat16, torch.float16)
        for heads, size in ((12, 64), (8, 96))
        for dropout in (0.0, 0.1)
        for longest in (128, 512)
    ]
    assert len({case.name for case in cases}) == len(cases)
    assert AttentionCase(torch.float32, 2, 16, 0.2, 64).name == CASE.name


def test_a_rival_that_is_not_there_or_has_no_dropout_is_left_out_with_the_reason(monkeypatch) -> None:
    def broken() -> str:
        raise OSError("libcudart.so.12: cannot open shared object file")

    rivals = {
        "here": Rival(attention, has_dropout=True),
        "not here": Rival(attention, has_dropout=True, module="no_such_module", package="none"),
        "dry": Rival(attention, has_dropout=False),
        "broken": Rival(attention, has_dropout=True, module="broken", package="broken"),
    }
    monkeypatch.setattr(attention_choice, "RIVALS", rivals)
    monkeypatch.setattr(
        Rival, "release", lambda self, real=Rival.release: broken() if self.module == "broken" else real(self)
    )
    assert CASE.releases() == {OURS: "", "here": ""}
    assert CASE.missing() == {
        "not here": "not installed",
        "dry": "has no dropout",
        "broken": "libcudart.so.12: cannot open shared object file",
    }
    without = AttentionCase(torch.float32, 2, 16, 0.0, 100)
    assert set(without.releases()) == {OURS, "here", "dry"}


def test_on_this_machine_torch_s_flash_attention_is_refused_by_its_own_words() -> None:
    """A CPU has none; that is what a measurement would write down."""
    with pytest.raises(Exception, match=r"(?i)flash"):
        CASE.step("FlashAttention-2 in torch", CPU)


def test_off_a_gpu_it_is_ours() -> None:
    assert kept([CASE], CPU) == {CASE.name: OURS}
    assert attend_by(OURS) is attention and all(attend_by(way) is RIVALS[way].attend for way in RIVALS)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ours_is_right(dtype: torch.dtype, dropout: float) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        check_attention(attention, 16, dtype, dropout, CPU)


class Masked(torch.autograd.Function):
    """Attention whose backward draws a mask of its own."""

    @staticmethod
    def forward(ctx, qkv: Tensor, cu_seqlens: Tensor, dropout: float, shift: int) -> Tensor:
        ctx.saved = qkv, cu_seqlens, dropout, torch.randint(2**31, (2,)), shift
        return attention(qkv, cu_seqlens, dropout=dropout, seed=ctx.saved[3])

    @staticmethod
    def backward(ctx, dout: Tensor):
        qkv, cu_seqlens, dropout, seed, shift = ctx.saved
        with torch.enable_grad():
            leaf = qkv.detach().requires_grad_()
            out = attention(leaf, cu_seqlens, dropout=dropout, seed=seed + shift)
        return *torch.autograd.grad(out, leaf, dout), None, None, None


def with_seed(seed: Callable[[], Tensor]) -> Callable[..., Tensor]:
    return lambda qkv, bounds, dropout: attention(qkv, bounds, dropout=dropout, seed=seed())


UNSEEDED = torch.Generator().manual_seed(0)
WRONG: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "scale": ("its output is wrong", lambda qkv, bounds, dropout: attention(qkv, bounds, dropout=dropout, scale=0.3)),
    "not a number": ("its output is wrong", lambda qkv, bounds, dropout: attention(qkv * torch.nan, bounds)),
    "one sequence": (
        "its output is wrong",
        lambda qkv, bounds, dropout: attention(qkv, bounds[[0, -1]].contiguous(), dropout=dropout),
    ),
    "gradient": (
        "its gradient is wrong",
        lambda qkv, bounds, dropout: attention(qkv, bounds, dropout=dropout).detach() + 0.0 * qkv[:, 0],
    ),
    "no seed": (
        "does not follow torch's seed",
        with_seed(lambda: torch.randint(2**31, (2,), generator=UNSEEDED)),
    ),
    "one mask": ("the same dropout again and again", with_seed(lambda: torch.tensor([5, 5]))),
    "another mask in backward": (
        "drops others than its forward",
        lambda qkv, bounds, dropout: Masked.apply(qkv, bounds, dropout, 1),
    ),
    "rate": (
        "another rate",
        lambda qkv, bounds, dropout: attention(qkv, bounds, dropout=dropout) * (1.0 + dropout / 5),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_attention_is_found(what: str) -> None:
    reason, attend = WRONG[what]
    with pytest.raises(ValueError, match=reason):
        check_attention(attend, 16, torch.float32, 0.1, CPU)


def test_a_mask_that_backward_repeats_passes() -> None:
    """The stand-in for a wrong one is right without its fault."""
    check_attention(lambda qkv, bounds, dropout: Masked.apply(qkv, bounds, dropout, 0), 16, torch.float32, 0.1, CPU)


def test_a_timed_step_is_forward_and_backward_over_typical_lengths(monkeypatch) -> None:
    monkeypatch.setattr(attention_choice, "typical_lengths", lambda longest: [longest, 30])
    (gradient,) = CASE.step(OURS, CPU)()
    assert gradient.shape == (130, 3, 2, 16) and gradient.dtype == torch.float32


def test_a_way_that_does_not_repeat_is_not_timed(monkeypatch) -> None:
    calls: list[int] = []

    def drifts(qkv: Tensor, bounds: Tensor, dropout: float) -> Tensor:
        calls.append(1)
        return attention(qkv, bounds, dropout=dropout) * (1.0 + 1e-6 * len(calls))

    monkeypatch.setattr(attention_choice, "typical_lengths", lambda longest: [longest, 30])
    monkeypatch.setattr(attention_choice, "check_attention", lambda *_: None)
    monkeypatch.setattr(attention_choice, "attend_by", lambda _: drifts)
    with pytest.raises(ValueError, match="its gradient does not repeat"):
        CASE.step("drifts", CPU)
