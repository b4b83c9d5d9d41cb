"""A body is asked with numbers that no client has sent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedbert_ds.server.body.device_work import DeviceWork
from fedbert_ds.server.body.health import is_healthy
from fedbert_kernels.encoded import Encoded


@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize(("result", "healthy"), [(1.0, True), (float("nan"), False), (float("inf"), False)])
def test_a_body_is_healthy_if_its_results_are_finite(with_rows: bool, result: float, healthy: bool) -> None:
    asked: list[Any] = []

    def evaluate(body_input: Any) -> DeviceWork:
        asked.append(body_input)
        return DeviceWork(Encoded.of(torch.full((8, 4), result), "fp32"))

    engine: Any = SimpleNamespace(lockstep_forwards=False, evaluate=evaluate)
    assert is_healthy(engine, 4, with_rows) is healthy
    (body_input,) = asked
    assert body_input.tokens == 8 and (body_input.row_index is not None) == with_rows
    assert not is_healthy(SimpleNamespace(lockstep_forwards=True), 4, with_rows), "nobody can be asked alone"  # type: ignore[arg-type]
