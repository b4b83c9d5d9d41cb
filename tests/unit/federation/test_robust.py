"""Robust rules equal their definitions in fp64; liars within their number cannot steer them."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbert_ds.federation.robust import krum, mean_of, median, squared_distances, trimmed_mean

VALUES = st.floats(-1e3, 1e3, width=32)
STACKS = st.integers(1, 9).flatmap(
    lambda rows: st.lists(st.lists(VALUES, min_size=3, max_size=3), min_size=rows, max_size=rows)
)


@settings(max_examples=60)
@given(stack=STACKS, liars=st.integers(0, 4))
def test_median_and_trimmed_mean_are_their_definitions(stack: list[list[float]], liars: int) -> None:
    columns = [sorted(column) for column in zip(*stack, strict=True)]
    got = median(torch.tensor(stack))
    assert got.tolist() == pytest.approx([statistics.median(column) for column in columns])
    if len(stack) > 2 * liars:
        kept = [column[liars : len(column) - liars] for column in columns]
        expected = [statistics.fmean(column) for column in kept]
        assert trimmed_mean(torch.tensor(stack), liars).tolist() == pytest.approx(expected, abs=1e-9)
    else:
        assert trimmed_mean(torch.tensor(stack), liars).tolist() == pytest.approx(got.tolist())


@settings(max_examples=60)
@given(stack=STACKS.filter(lambda stack: len(stack) >= 5))
def test_krum_is_its_definition(stack: list[list[float]]) -> None:
    rows = torch.tensor(stack)
    distances = squared_distances(rows)
    count, liars = len(stack), 1
    scores = []
    for row in range(count):
        others = [float((rows[row].double() - rows[other].double()).square().sum()) for other in range(count)]
        assert distances[row].tolist() == pytest.approx(others)
        scores.append(sum(sorted(others[:row] + others[row + 1 :])[: count - liars - 2]))
    chosen = krum(distances, liars)
    assert len(chosen) == count - liars and chosen == sorted(chosen)
    (left_out,) = set(range(count)) - set(chosen)
    assert scores[left_out] == pytest.approx(max(scores), rel=1e-6, abs=1e-6)
    expected = [statistics.fmean(stack[row][column] for row in chosen) for column in range(3)]
    assert mean_of(rows, chosen).tolist() == pytest.approx(expected, abs=1e-9)


@settings(max_examples=40)
@given(
    honest=st.lists(st.lists(st.floats(-1.0, 1.0, width=32), min_size=4, max_size=4), min_size=7, max_size=7),
    lie=st.sampled_from([-1e6, -3.0, 0.0, 3.0, 1e6]),
    place=st.permutations(range(10)),
)
def test_three_liars_of_ten_cannot_leave_the_range_of_the_honest(
    honest: list[list[float]], lie: float, place: list[int]
) -> None:
    rows = torch.tensor([*honest, *[[lie] * 4] * 3])[place]
    low, high = torch.tensor(honest).amin(dim=0), torch.tensor(honest).amax(dim=0)
    for result in (median(rows), trimmed_mean(rows, 3)):
        assert (low - 1e-6 <= result).all() and (result <= high + 1e-6).all()
    if abs(lie) > 100:
        assert all(place[row] < 7 for row in krum(squared_distances(rows), 3)), "the liars are left out"


def test_rules_do_not_depend_on_the_order_of_clients() -> None:
    rows = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    results = set()
    for order in itertools.permutations(range(5)):
        stack = rows[list(order)]
        chosen = frozenset(order[row] for row in krum(squared_distances(stack), 1))
        results.add((tuple(median(stack).tolist()), tuple(trimmed_mean(stack, 1).tolist()), chosen))
    assert len(results) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_window_with_fewer_clients_than_the_rule_needs_assumes_fewer_liars(count: int) -> None:
    rows = torch.arange(float(count))[:, None]
    assert krum(squared_distances(rows), 3) == list(range(count))
    assert trimmed_mean(rows, 3).item() == pytest.approx((count - 1) / 2)
