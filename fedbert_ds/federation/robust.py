"""Combining updates so that some liars among the clients cannot steer the result.

Pure rules over a stack of updates, one row a client, in which every client counts alike. They are a
few lines of torch each; a library of them (byzfl) would bring its own copies of all updates, where
here they come a piece at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def median(stack: Tensor) -> Tensor:
    """The median of each column of [N, n], fp64; the mean of the middle two for an even N.

    Yin et al., "Byzantine-Robust Distributed Learning" (ICML 2018), Option I.
    """
    return trimmed_mean(stack, (len(stack) - 1) // 2)


def trimmed_mean(stack: Tensor, liars: int) -> Tensor:
    """The mean of each column of [N, n] without its `liars` largest and smallest, fp64.

    Yin et al. 2018, Option II. With too few rows for so many liars, the median.
    """
    trimmed = min(liars, (len(stack) - 1) // 2)
    ordered = stack.to(torch.float64).sort(dim=0).values
    return ordered[trimmed : len(ordered) - trimmed].mean(dim=0)


def squared_distances(stack: Tensor) -> Tensor:
    """[N, N] fp64: of the rows of [N, n] from each other. Those of pieces of updates add up."""
    rows = stack.to(torch.float64)
    return torch.stack([(rows - row).square().sum(dim=1) for row in rows])


def krum(distances: Tensor, liars: int) -> list[int]:
    """The rows that Multi-Krum averages, ascending: the N - liars of the lowest scores.

    `distances` are [N, N] squared ones. A row's score is their sum to its N - liars - 2 nearest
    others (Blanchard et al., "Machine Learning with Adversaries", NeurIPS 2017, section 4). It
    needs N > 2 liars + 2; with fewer rows fewer liars are assumed. Equal scores count in order.
    """
    count = len(distances)
    liars = max(0, min(liars, (count - 3) // 2))
    nearest = max(1, count - liars - 2)
    # The first of a row's distances is 0, to itself.
    scores = distances.sort(dim=1).values[:, 1 : nearest + 1].sum(dim=1)
    best = sorted(range(count), key=lambda row: (float(scores[row]), row))
    return sorted(best[: count - liars])


def mean_of(stack: Tensor, rows: Sequence[int]) -> Tensor:
    """The mean of some rows of [N, n], fp64."""
    return stack[list(rows)].to(torch.float64).mean(dim=0)
