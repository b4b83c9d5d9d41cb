"""The step of DeepSpeed's bf16 optimizer at ZeRO stage 0, by fp32 gradients of its fp32 weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch


def step_by_fp32_gradients(optimizer: Any) -> None:
    """Let an FP16_UnfusedOptimizer step by the gradients in its `fp32_groups`.

    Its own step reads bf16 gradients of the rounded weights. It has also stepped once when made, by
    gradients of zero, which moves Adam's count and decays weights: that is undone.
    """
    optimizer.optimizer.state.clear()
    for masters, rounded in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
        for master, weight in zip(masters, rounded, strict=True):
            master.data.copy_(weight.data)
    optimizer.step = partial(_step, optimizer)


@torch.no_grad()
def _step(optimizer: Any) -> None:
    masters = [master for group in optimizer.fp32_groups for master in group]
    rounded = [weight for group in optimizer.fp16_groups for weight in group]
    norm = torch.nn.utils.get_total_norm([master.grad for master in masters])
    optimizer.overflow = not bool(norm.isfinite())
    optimizer._global_grad_norm = norm
    if not optimizer.overflow:
        optimizer.unscale_and_clip_grads(norm)
        optimizer.optimizer.step()
        torch._foreach_copy_(rounded, masters)
    for master in masters:
        master.grad = None
