"""Sums and weighted averages of client updates, over the clients of a rank and then over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedbert_ds.federation.client_update import ClientUpdate


class NobodyDelivered(Exception):
    """An average over no client of any rank: every client was lost or suspended."""


def combine(
    updates: Sequence[ClientUpdate],
    shapes: Mapping[str, tuple[int, ...]],
    average: bool,
    group: torch.distributed.ProcessGroup | None,
) -> dict[str, Tensor]:
    """The sum of all ranks' updates, or their weighted average (FedAvg, McMahan et al. 2017), fp32.

    `updates` are this rank's, in an order independent of arrival, so that the result repeats bit
    for bit. Accumulates in fp64. The average of one update is that update, bit for bit; updates of
    weight 0 alone count equally. Raises NobodyDelivered, on every rank, for an average of nothing.
    """
    weights = [update.weight if average else 1.0 for update in updates]
    totals = torch.tensor([sum(weights), len(weights)], dtype=torch.float64)
    if group is not None:
        torch.distributed.all_reduce(totals, group=group)
    total, count = totals.tolist()
    if average and count == 0:
        raise NobodyDelivered
    if total == 0:
        # No client counted a token (very short texts).
        weights, total = [1.0] * len(updates), count
    combined = {}
    for name, shape in shapes.items():
        accumulated = torch.zeros(shape, dtype=torch.float64)
        for update, weight in zip(updates, weights, strict=True):
            accumulated.add_(update.tensors[name].to(torch.float64), alpha=weight)
        if group is not None:
            torch.distributed.all_reduce(accumulated, group=group)
        if average and total > 0:
            accumulated /= total
        combined[name] = accumulated.to(torch.float32)
    return combined


def combine_ranks(
    updates: Sequence[Sequence[ClientUpdate]], shapes: Mapping[str, tuple[int, ...]], average: bool
) -> dict[str, Tensor]:
    """`combine` in one process, of the updates of each rank's clients: the same numbers, bit for
    bit.

    Sums go over the clients of a rank first, then over ranks. (With more than two ranks the order
    of `combine` is that of its collective, and the fp64 sums may differ in their last bit.) Raises
    NobodyDelivered for an average of nothing.
    """
    weights = [[update.weight if average else 1.0 for update in rank] for rank in updates]
    total = sum(sum(rank) for rank in weights)
    count = sum(len(rank) for rank in weights)
    if average and count == 0:
        raise NobodyDelivered
    if total == 0:
        weights, total = [[1.0] * len(rank) for rank in updates], float(count)
    combined = {}
    for name, shape in shapes.items():
        accumulated = torch.zeros(shape, dtype=torch.float64)
        for rank, rank_weights in zip(updates, weights, strict=True):
            mine = torch.zeros(shape, dtype=torch.float64)
            for update, weight in zip(rank, rank_weights, strict=True):
                mine.add_(update.tensors[name].to(torch.float64), alpha=weight)
            accumulated += mine
        if average and total > 0:
            accumulated /= total
        combined[name] = accumulated.to(torch.float32)
    return combined


def global_norm(tensors: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all tensors together, accumulated in fp64."""
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5
