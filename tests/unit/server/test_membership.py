"""A client that comes, is suspended or goes: every room of the rank hears of it in one call."""

from __future__ import annotations

import pytest
from unit.server.fake_client import FakeClient
from unit.server.fakes import Rank, run_config

from fedbert_ds.server.membership import Membership
from fedbert_ds.server.queue.deadlines import Question


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    """ada and bo are connected, and their updates of window 0 are awaited."""
    config = run_config(clients={"expected": 2, "minimum": 1})
    made = Rank(monkeypatch, config, [FakeClient("ada", config), FakeClient("bo", config)])
    for client in made.clients:
        made.served.rooms.membership.join(client.name, made.clock.now)
    made.served.rooms.exchange.expect(0, ["ada", "bo"], average=False)
    return made


def members(rank: Rank) -> Membership:
    return rank.served.rooms.membership


def test_a_departure_reaches_every_room(rank: Rank) -> None:
    rooms = rank.served.rooms
    rooms.queue.deadlines.ask("bo", Question("update", 0), rank.clock.now)
    members(rank).refuse("bo", "client bo: a loss of nan")
    assert rooms.queue.clients == {"ada"}
    assert rooms.exchange.awaited(0) == {"ada"}
    assert rank.endpoint.revoked == {"bo"} and rank.endpoint.closed == {"bo"}
    assert rank.clients[1].refusal == "client bo: a loss of nan"
    rank.clock.now += 1000.0
    assert rooms.queue.deadlines.late(rank.clock.now).client == "ada", "nobody waits for bo"  # type: ignore[union-attr]


def test_a_client_that_is_gone_is_told_of_once(rank: Rank) -> None:
    members(rank).disconnect("bo")
    members(rank).disconnect("bo")
    members(rank).disconnect("nobody")
    assert members(rank).problems == ["client bo disconnected"]


def test_problems_are_new_once(rank: Rank) -> None:
    members(rank).disconnect("bo")
    assert members(rank).take_new_problems() == ("client bo disconnected",)
    assert members(rank).take_new_problems() == ()
    members(rank).expire("ada")
    assert members(rank).take_new_problems() == ("client ada was silent for 300 s (clients.silence_timeout)",)
    assert len(members(rank).problems) == 2


def test_a_suspended_client_stays_connected_and_hears_what_is_skipped(rank: Rank) -> None:
    rooms = rank.served.rooms
    rooms.queue.deadlines.ask("bo", Question("update", 0), rank.clock.now)
    skipped = []
    rank.clients[1].handle = lambda message: skipped.append(message.skipped) or []  # type: ignore[func-returns-value, method-assign]
    members(rank).suspend("bo", [(0, 3), (1, 8), (0, 4)])
    assert rooms.queue.clients == {"ada", "bo"} and rank.endpoint.revoked == set()
    assert [(message.window, list(message.micro_batches)) for message in skipped] == [(0, [3, 4]), (1, [8])]
    assert members(rank).problems == [
        "client bo is late: windows go on without it until it answers; its update of window 0 is left out"
    ]
    assert rooms.queue.deadlines.asked_at("bo", Question("update", 0)) is None, "its update is not waited for"
