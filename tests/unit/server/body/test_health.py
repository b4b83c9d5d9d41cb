"""A body is asked with numbers that no client has sent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedbert_ds.errors import NotFinite
from fedbert_ds.server.body.device_work import DeviceWork
from fedbert_ds.server.body.health import BodyHealth
from fedbert_kernels.encoded import Encoded


@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize(("result", "healthy"), [(1.0, True), (float("nan"), False), (float("inf"), False)])
@pytest.mark.parametrize("is_lockstep", [False, True])
def test_a_body_is_healthy_if_its_results_are_finite(
    with_rows: bool, result: float, healthy: bool, is_lockstep: bool
) -> None:
    asked: list[Any] = []

    def evaluate(body_input: Any) -> DeviceWork:
        asked.append(body_input)
        return DeviceWork(Encoded.of(torch.full((8, 4), result), "fp32"))

    engine: Any = SimpleNamespace(lockstep_forwards=is_lockstep, evaluate=evaluate)
    health = BodyHealth(engine, 4, with_rows)

    def look() -> None:
        health.look_into(NotFinite("it is not finite"))
        if is_lockstep:
            assert health.doubt == "it is not finite" and not asked, "all ranks ask together"
            health.settle(["", health.doubt])

    if healthy:
        look()
    else:
        with pytest.raises(NotFinite, match="it is not finite"):
            look()
    assert not health.doubt
    (body_input,) = asked
    assert body_input.tokens == 8 and (body_input.row_index is not None) == with_rows


def test_nobody_asks_where_no_rank_doubts() -> None:
    BodyHealth(SimpleNamespace(lockstep_forwards=True), 4, False).settle(["", ""])  # type: ignore[arg-type]
