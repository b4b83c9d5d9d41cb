"""What the wiring of a rank decides: whose seats are here, whether anything is learned from the
clock.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from unit.server.fake_client import FakeClient
from unit.server.fakes import Clock, FakeEndpoint, FakeEngine, FakeRankGroup, Served, run_config, seats

from fedbert_ds.server.rooms import Rooms


def rooms_of(order: str = "arrival", on_loss: str = "continue", clipping: float = 1.0, **federation: Any) -> Rooms:
    config = run_config(
        window={"order": order},
        federation=federation,
        clients={"on_loss": on_loss},
        optimizer={"gradient_clipping": clipping},
    )
    clients = [FakeClient("ada", config), FakeClient("bo", config)]
    places = seats(clients)
    places["bo"] = replace(places["bo"], rank=1)
    return Served(config, FakeEngine(), FakeEndpoint(Clock(), clients, lambda c, e: 0.0), FakeRankGroup(), places).rooms


def test_only_clients_of_this_rank_are_seated() -> None:
    rooms = rooms_of()
    assert rooms.members.at(0) == {"ada"} and rooms.members.at(1) == {"bo"}


@pytest.mark.parametrize(
    ("order", "on_loss", "learns"),
    [("arrival", "continue", True), ("fixed", "continue", False), ("arrival", "wait", False), ("fixed", "wait", False)],
)
def test_with_a_fixed_order_or_where_nobody_is_left_out_nothing_depends_on_the_clock(
    order: str, on_loss: str, learns: bool
) -> None:
    deadlines = rooms_of(order, on_loss).queue.deadlines
    assert (deadlines.answer_times is not None) == learns
    assert deadlines.silence_timeout == 300.0, "but nobody may stay silent for ever"


@pytest.mark.parametrize(
    ("on_loss", "clipping", "mode", "holds"),
    [
        ("continue", 1.0, "synchronous", True),
        ("continue", 0.0, "synchronous", False),
        ("wait", 0.0, "synchronous", True),
        ("wait", 1.0, "parallel", False),
    ],
)
def test_updates_are_held_where_the_step_may_still_be_undone_or_scaled(
    on_loss: str, clipping: float, mode: str, holds: bool
) -> None:
    assert rooms_of(on_loss=on_loss, clipping=clipping, mode=mode).service.holds_updates == holds


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_staleness_is_what_the_run_file_says(staleness: int) -> None:
    assert rooms_of(staleness=staleness).staleness == staleness
