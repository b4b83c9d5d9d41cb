"""Sums and whole matrices of parameters whose elements lie on several ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from unit.model.thread_ranks import CUTS, flat_of, partition, run_ranks, whole_of

from fedbert_ds.model.partition import Shape, WholeMatrices, deal

SHAPES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=6)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(shapes=SHAPES, ranks=st.integers(1, 4), cut=st.sampled_from(sorted(CUTS)))
@example(shapes=[(1, 1)], ranks=4, cut="end to end")
def test_matrices_come_whole_to_one_rank_each_and_go_back(shapes: list[Shape], ranks: int, cut: str) -> None:
    tensors = [torch.arange(math.prod(shape)).view(shape) + 1000.0 * n for n, shape in enumerate(shapes)]

    def run(rank: int) -> tuple[dict[int, Tensor], Tensor]:
        where, length = partition(cut, shapes, rank, ranks)
        flat = flat_of(tensors, where, length, padding=-1.0)
        dealt = WholeMatrices(where)
        mine = dealt.gather(flat)
        dealt.scatter({number: 2 * matrix for number, matrix in mine.items()}, flat)
        return mine, flat

    results = run_ranks(ranks, run)
    gathered = [(number, matrix) for mine, _ in results for number, matrix in mine.items()]
    assert sorted(number for number, _ in gathered) == list(range(len(shapes)))
    assert all(torch.equal(matrix, tensors[number]) for number, matrix in gathered)
    where, length = partition(cut, shapes, 0, ranks)
    back = whole_of([flat for _, flat in results], where)
    assert all(torch.equal(matrix, 2 * tensor) for matrix, tensor in zip(back, tensors, strict=True))
    padding = ranks * length - sum(map(math.prod, shapes))
    assert sum(int((flat == -1).sum()) for _, flat in results) == padding, "padding stays"


@settings(max_examples=40, derandomize=True, deadline=None)
@given(shapes=SHAPES, ranks=st.integers(1, 4), cut=st.sampled_from(sorted(CUTS)))
@example(shapes=[(1, 1)], ranks=4, cut="each cut")
def test_sums_are_those_of_whole_parameters(shapes: list[Shape], ranks: int, cut: str) -> None:
    tensors = [torch.arange(1.0, 1 + math.prod(shape)).view(shape) + 100 * n for n, shape in enumerate(shapes)]

    def run(rank: int) -> bool:
        where, length = partition(cut, shapes, rank, ranks)
        views = where.views(flat_of(tensors, where, length, padding=1e9))
        found = where.sums(torch.tensor([[float(view.sum()) for view in views], [1.0] * len(views)]))
        slices = [sum(part.parameter == n for of_rank in where.slices for part in of_rank) for n in range(len(shapes))]
        expected = [[float(tensors[part.parameter].sum()) for part in where.own]]
        return torch.equal(found, torch.tensor([*expected, [float(slices[part.parameter]) for part in where.own]]))

    assert all(run_ranks(ranks, run))


def test_matrices_are_dealt_by_what_they_cost() -> None:
    """A layer of BERT: four square matrices, and two that are four times as long."""
    layer: list[Shape] = [(8, 8)] * 4 + [(32, 8), (8, 32)]
    for ranks in (1, 2, 3, 4, 8):
        owners = deal(layer * 12, ranks)
        costs = [math.prod(shape) * min(shape) for shape in layer * 12]
        loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == n) for n in range(ranks)]
        assert max(loads) - min(loads) <= max(costs), ranks
    assert deal([(2, 2)], 3) == [0] and deal([], 2) == []


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_rank_deals_alike(ranks: int) -> None:
    shapes: list[Shape] = [(3, 3), (3, 3), (2, 9), (9, 2)]
    assert deal(shapes, ranks) == deal(list(shapes), ranks)
    assert set(deal(shapes, ranks)) == set(range(ranks))
