"""What the wiring of a rank decides: whose seats are here, whether anything is learned from the
clock.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from unit.server.fake_client import FakeClient
from unit.server.fakes import Clock, FakeEndpoint, FakeEngine, FakeRankGroup, Served, run_config, seats

from fedbert_ds.server.rooms import Rooms


def rooms_of(order: str = "arrival", **federation: int) -> Rooms:
    config = run_config(window={"order": order}, federation=federation)
    clients = [FakeClient("ada", config), FakeClient("bo", config)]
    places = seats(clients)
    places["bo"] = replace(places["bo"], rank=1)
    return Served(config, FakeEngine(), FakeEndpoint(Clock(), clients, lambda c, e: 0.0), FakeRankGroup(), places).rooms


def test_only_clients_of_this_rank_are_seated() -> None:
    assert rooms_of().seated == {"ada"}


@pytest.mark.parametrize(("order", "learns"), [("arrival", True), ("fixed", False)])
def test_with_a_fixed_order_nothing_depends_on_the_clock(order: str, learns: bool) -> None:
    deadlines = rooms_of(order).queue.deadlines
    assert (deadlines.answer_times is not None) == learns
    assert deadlines.silence_timeout == 300.0, "but nobody may stay silent for ever"


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_staleness_is_what_the_run_file_says(staleness: int) -> None:
    assert rooms_of(staleness=staleness).staleness == staleness
