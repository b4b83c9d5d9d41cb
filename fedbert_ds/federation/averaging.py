"""Sums and weighted averages of client halves: over a rank's clients, then over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def combine(
    halves: Sequence[tuple[Mapping[str, Tensor], float]],
    shapes: Mapping[str, tuple[int, ...]],
    average: bool,
    group: torch.distributed.ProcessGroup | None,
) -> dict[str, Tensor]:
    """The sum of all ranks' halves (gradients), or their weighted average (FedAvg, McMahan et al. 2017).

    `halves` are this rank's, in an order that does not depend on arrival, so that the result is the same every time.
    Accumulates in fp64; returns fp32. With one half in all, an average returns it bit for bit.
    """
    weights = [weight if average else 1.0 for _, weight in halves]
    totals = torch.tensor([sum(weights), len(weights)], dtype=torch.float64)
    if group is not None:
        torch.distributed.all_reduce(totals, group=group)
    total, count = totals.tolist()
    if total == 0:
        # Nobody counted a token (very short texts): all halves weigh the same.
        weights, total = [1.0] * len(halves), count
    combined = {}
    for name, shape in shapes.items():
        accumulated = torch.zeros(shape, dtype=torch.float64)
        for (tensors, _), weight in zip(halves, weights, strict=True):
            accumulated.add_(tensors[name].to(torch.float64), alpha=weight)
        if group is not None:
            torch.distributed.all_reduce(accumulated, group=group)
        if average and total > 0:
            accumulated /= total
        combined[name] = accumulated.to(torch.float32)
    return combined
