"""Processes compute batches in turn; their sums come in order, and an error comes through."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from fedbert_ds.evaluation.workers import SumOf, in_processes


def scaled(scale: float, device: str) -> SumOf:
    return lambda batch: scale * sum(batch) + {"one": 0.25, "two": 0.25}[device]


def own_process(device: str) -> SumOf:
    return lambda batch: float(os.getpid())


def failing(device: str) -> SumOf:
    def sum_of(batch: Sequence[int]) -> float:
        raise ValueError(f"batch {batch[0]}")

    return sum_of


def test_sums_are_in_the_order_of_batches() -> None:
    batches = [[number, 1] for number in range(20)]
    assert list(in_processes(scaled, [2.0], batches, ["one", "two"])) == [2.0 * n + 2.25 for n in range(20)]


def test_this_process_computes_none() -> None:
    assert float(os.getpid()) not in set(in_processes(own_process, [], [[1]] * 8, ["cpu", "cpu"]))


def test_an_error_of_a_worker_is_raised_here() -> None:
    with pytest.raises(ValueError, match="batch 3"):
        list(in_processes(failing, [], [[3]], ["cpu"]))
