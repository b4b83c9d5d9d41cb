"""DeepSpeed's bf16 optimizer of stage 0 steps by fp32 gradients, and has not stepped before."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

from fedbert_ds.server.body.whole_step import step_by_fp32_gradients


def wrapped(clip: float = 0.0) -> tuple[list[torch.nn.Parameter], FP16_UnfusedOptimizer]:
    weights = [torch.nn.Parameter(torch.full((3,), value).bfloat16()) for value in (1.0, -2.0)]
    inner = torch.optim.AdamW(weights, lr=0.5, weight_decay=0.5)
    optimizer = FP16_UnfusedOptimizer(inner, low_precision_dtype=torch.bfloat16, clip_grad=clip)
    step_by_fp32_gradients(optimizer)
    return weights, optimizer


def masters(optimizer: FP16_UnfusedOptimizer) -> list[torch.Tensor]:
    return [master for group in optimizer.fp32_groups for master in group]


def give(optimizer: FP16_UnfusedOptimizer, *values: float) -> None:
    for master, value in zip(masters(optimizer), values, strict=True):
        master.grad = torch.full((3,), value)


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda *_: 0)


def test_its_first_step_is_the_first() -> None:
    weights, optimizer = wrapped()
    assert [master.tolist() for master in masters(optimizer)] == [[1.0] * 3, [-2.0] * 3]
    assert not optimizer.optimizer.state
    give(optimizer, 1e-3, 1e-3)
    optimizer.step()
    # Decayed by a quarter, and moved by the rate: Adam's first direction is 1.
    for master, weight, expected in zip(masters(optimizer), weights, (0.25, -2.0), strict=True):
        torch.testing.assert_close(master.detach(), torch.full((3,), expected), atol=1e-4, rtol=0)
        assert torch.equal(weight.detach(), master.detach().bfloat16()) and master.grad is None


def test_gradients_are_clipped_by_the_norm_of_all() -> None:
    _, optimizer = wrapped(clip=1.0)
    give(optimizer, 3.0, 4.0)
    seen = []
    optimizer.optimizer.step = lambda: seen.extend(master.grad.clone() for master in masters(optimizer))
    optimizer.step()
    assert torch.cat(seen).norm() == pytest.approx(1.0, rel=1e-5) and seen[0][0] == pytest.approx(0.75 * seen[1][0])


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    weights, optimizer = wrapped()
    give(optimizer, 1.0, float("nan"))
    optimizer.step()
    assert optimizer.overflow and not optimizer.optimizer.state
    assert [weight.tolist() for weight in weights] == [[1.0] * 3, [-2.0] * 3]
    give(optimizer, 1.0, 1.0)
    optimizer.step()
    assert not optimizer.overflow and optimizer.optimizer.state
