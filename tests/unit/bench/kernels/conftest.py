"""What becomes of a problem's ways on the CPU, with times that do not matter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedbert_ds.bench.kernels.problem import Problem, measure

Outcomes = dict[tuple[str, str], str | None]


@pytest.fixture(scope="session")
def outcomes() -> Callable[[Problem], Outcomes]:
    """{(way, pass): the reason it was not measured, or None}."""

    def of(problem: Problem) -> Outcomes:
        rows = measure(problem, torch.device("cpu"), peak=1e9, rounds=1, seconds=0.0)
        return {(row["way"], row["pass"]): row.get("reason") for row in rows}

    return of
