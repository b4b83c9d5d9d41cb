"""A client that comes, is suspended or goes: every room of the rank hears of it in one call."""

from __future__ import annotations

import pytest
from unit.server.fake_client import FakeClient
from unit.server.fakes import Rank, run_config

from fedbert_ds.server.membership import Membership
from fedbert_ds.server.queue.deadlines import Question
from fedbert_ds.server.queue.decisions import Plan
from fedbert_ds.wire.messages import Manifest


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    return rank_with(monkeypatch)


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Rank:
    return rank_with(monkeypatch, on_loss="wait")


def rank_with(monkeypatch: pytest.MonkeyPatch, on_loss: str = "continue") -> Rank:
    """ada and bo are connected, and their updates of window 0 are awaited."""
    config = run_config(clients={"expected": 2, "minimum": 1, "on_loss": on_loss})
    made = Rank(monkeypatch, config, [FakeClient("ada", config), FakeClient("bo", config)])
    for client in made.clients:
        made.served.rooms.membership.join(client.name, made.clock.now)
    made.served.rooms.exchange.expect(0, dict.fromkeys(["ada", "bo"], 1), average=False)
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


def announce(rank: Rank, *clients: str) -> None:
    for client in clients:
        manifest = Manifest(client, rank.served.rooms.queue.roster.next_window, (4,), (2,))
        rank.served.rooms.queue.manifest(manifest)
        rank.served.rooms.cursors.announce(client, manifest.window, {"epoch": 0, "position": 1, "sequences": 9})


def test_what_a_departed_client_announced_does_not_count_as_trained(rank: Rank) -> None:
    announce(rank, "ada", "bo")
    members(rank).disconnect("bo")
    rank.served.rooms.cursors.commit(0)
    assert rank.served.rooms.cursors.committed.keys() == {"ada"}


@pytest.mark.parametrize("on_loss", ["continue", "wait"])
def test_whoever_is_gone_is_absent_where_the_run_waits(monkeypatch: pytest.MonkeyPatch, on_loss: str) -> None:
    rank = rank_with(monkeypatch, on_loss)
    members(rank).disconnect("bo")
    announce(rank, "ada")
    decision = rank.served.rooms.queue.decide(rank.clock.now)
    if on_loss == "continue":
        assert members(rank).absent == set() and isinstance(decision, Plan)
    else:
        assert members(rank).absent == {"bo"} and decision is None, "no window is planned without it"


@pytest.mark.parametrize("way", ["refuse", "expire", "disconnect", "evict"])
def test_whatever_the_way_it_left_it_is_awaited_until_it_is_back(waiting: Rank, way: str) -> None:
    reason = ["a loss of nan"] if way == "refuse" else []
    getattr(members(waiting), way)("bo", *reason)
    assert members(waiting).absent == {"bo"}
    members(waiting).join("bo", waiting.clock.now)
    assert members(waiting).absent == set()


@pytest.mark.parametrize(("way", "may_return"), [("refuse", False), ("expire", True), ("evict", True)])
def test_only_who_did_nothing_wrong_is_told_that_it_may_return(rank: Rank, way: str, may_return: bool) -> None:
    """One that breaks the protocol would do it again. The one that is evicted may be the very
    process that has joined: other ranks hear late of who waits at the door.
    """
    reason = ["a loss of nan"] if way == "refuse" else []
    getattr(members(rank), way)("bo", *reason)
    assert rank.clients[1].refusal is not None and rank.clients[1].may_return == may_return


def test_an_evicted_client_has_lost_its_place_and_its_connection(rank: Rank) -> None:
    members(rank).detached.add("bo")
    members(rank).evict("bo")
    assert members(rank).detached == set()
    assert rank.served.rooms.queue.clients == {"ada"} and rank.endpoint.revoked == {"bo"}
    assert members(rank).problems == ["client bo disconnected, and joins again"]


def test_windows_go_on_while_one_comes_that_is_not_awaited(rank: Rank) -> None:
    members(rank).join("cy", rank.clock.now, is_awaited=False)
    announce(rank, "ada", "bo")
    decision = rank.served.rooms.queue.decide(rank.clock.now)
    assert isinstance(decision, Plan) and {m.client for m in decision.manifests} == {"ada", "bo"}


def test_a_client_that_comes_and_goes_for_ever_takes_no_memory(rank: Rank) -> None:
    """Every rank hears of these problems, at every window."""
    for _ in range(1000):
        members(rank).refuse("bo", "client bo: no")
        members(rank).join("bo", 0.0)
    assert members(rank).problems == ["client bo: no"] * 100
    told = members(rank).take_new_problems()
    assert len(told) == 101 and told[-1].endswith("more problems with clients")
    assert members(rank).take_new_problems() == ()
