"""What a rank does for its clients beside the body: events in, plans and credit out, updates handed
on.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from unit.server.fake_client import HALF, FakeClient, cursor_at
from unit.server.fakes import Rank, hello_of, joined, run_config
from unit.server.queue.federation import queue_state

from fedbert_ds.errors import WireError
from fedbert_ds.federation.client_update import update_chunks
from fedbert_ds.federation.reference import Reference, from_bytes
from fedbert_ds.server.network.decoding import Decoded
from fedbert_ds.server.network.events import (
    Attached,
    Connected,
    Detached,
    Disconnected,
    Event,
    JoinAbandoned,
    Knocked,
    Received,
)
from fedbert_ds.server.queue.deadlines import Question
from fedbert_ds.server.queue.decisions import Step
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.messages import PROTOCOL


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    config = run_config(clients={"expected": 2, "minimum": 1}, optimizer={"gradient_clipping": 0.0})
    made = Rank(monkeypatch, config, [FakeClient("ada", config), FakeClient("bo", config)])
    made.served.connect()
    return made


def sent(rank: Rank, kind: str) -> list[tuple[str, Any]]:
    return [(name, getattr(m, kind)) for name, m in rank.endpoint.sent if m.WhichOneof("body") == kind]


def test_while_the_body_is_idle_windows_are_planned_and_get_credit(rank: Rank) -> None:
    service = rank.served.rooms.service
    while not service.plans:
        service.attend()
    assert [name for name, _ in sent(rank, "plan")] == ["ada", "bo"]
    assert all(plan.window == 0 and plan.next_window == 1 for _, plan in sent(rank, "plan"))
    planned = {(p.micro_batch, name) for name, plan in sent(rank, "plan") for p in plan.pieces}
    assert {(credit.micro_batch, name) for name, credit in sent(rank, "open")} == planned


def test_a_decision_about_the_body_is_not_its_business(rank: Rank) -> None:
    with pytest.raises(AssertionError, match="needs a running window"):
        rank.served.rooms.service.carry_out(Step(0, 0))


def test_what_was_combined_goes_to_everybody(rank: Rank) -> None:
    rooms = rank.served.rooms
    rooms.exchange.expect(0, dict.fromkeys(["ada", "bo"], 1), average=False)
    for client, value in (("ada", 1.0), ("bo", 2.0)):
        tensors = {name: torch.full(shape, value) for name, shape in HALF.items()}
        for chunk in update_chunks(0, tensors.items()):
            rank.endpoint.post(client, Received(client, pb.ClientMessage(update=chunk)))
    rooms.service.finish_exchanges()
    for client in rank.clients:
        assert all(torch.equal(client.updates[-1][name], torch.full(shape, 3.0)) for name, shape in HALF.items())
    assert rooms.aggregator.reference().version == 1, "and to the aggregator"


def test_an_update_that_is_not_sound_costs_its_client_alone(rank: Rank) -> None:
    rooms = rank.served.rooms
    rooms.exchange.expect(0, dict.fromkeys(["ada", "bo"], 1), average=False)

    def unsound() -> Any:
        raise WireError("client bo: its update: tensor 'table' holds nan")

    rooms.exchange.deliver(0, "bo", unsound)
    rooms.service.hand_out_updates()
    assert rank.clients[1].refusal == "client bo: its update: tensor 'table' holds nan"
    assert rooms.queue.clients == {"ada"}


def test_who_is_asked_and_stays_silent_is_expired_and_the_rank_goes_on(rank: Rank) -> None:
    rooms = rank.served.rooms
    answers: dict[str, object] = {"ada": True}
    done: list[bool] = []
    request = pb.ServerMessage(save=pb.Save(window=5))
    rank.clients[1].handle = lambda message: []  # type: ignore[method-assign]
    rooms.inbox.expect_saved(5)
    rooms.service.ask(["ada", "bo"], Question("saved", 5), request, answers, meanwhile=lambda: done.append(True))
    assert done == [True] and rooms.queue.clients == {"ada"}
    assert rooms.membership.problems == ["client bo was silent for 300 s (clients.silence_timeout)"]


def test_a_join_while_the_run_goes_on_is_answered(rank: Rank) -> None:
    wrong, answer = joined(pb.Hello(client="late"))
    assert rank.served.rooms.service.dispatch(wrong)
    with pytest.raises(WireError, match=f"client late speaks protocol 0, this server {PROTOCOL}"):
        answer.result(timeout=0)
    good, waiting = joined(hello_of("late"))
    assert rank.served.reception is not None and not rank.served.reception.is_asked
    assert rank.served.rooms.service.dispatch(good)
    assert rank.served.reception.is_asked and not waiting.done(), "it is let in between two windows"
    assert rank.served.rooms.service.dispatch(JoinAbandoned(good.hello))
    assert not rank.served.reception.is_asked


# -- where clients go on ---------------------------------------------------------------------------


def begun(rank: Rank, client: int = 0) -> pb.Begin:
    return rank.clients[client].begins[-1]


def test_a_client_that_comes_begins_with_the_reference_and_at_its_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(clients={"expected": 2, "minimum": 1}, optimizer={"gradient_clipping": 0.0})
    rank = Rank(monkeypatch, config, [FakeClient("ada", config), FakeClient("bo", config)])
    cursor = {"epoch": 3, "position": 40, "sequences": 900}
    rank.served.rooms.cursors.roll_back({"bo": cursor})
    rank.served.connect()
    assert begun(rank, 0) == pb.Begin(reference=True), "from the beginning of its text"
    assert begun(rank, 1) == pb.Begin(reference=True, cursor=pb.Cursor(**cursor))
    assert all(client.updates[0].keys() == HALF.keys() for client in rank.clients)


def test_a_client_that_comes_later_gets_the_windows_trained_since_and_the_moments(rank: Rank) -> None:
    rooms = rank.served.rooms
    rooms.aggregator.apply(0, {name: torch.ones(shape) for name, shape in HALF.items()})
    while not rooms.service.plans:
        rooms.service.attend()
    rooms.membership.disconnect("bo")
    rank.endpoint.sent.clear()
    assert rooms.service.dispatch(Connected("bo"))
    assert begun(rank, 1) == pb.Begin(window=1, next_window=1, reference=True)
    chunks = b"".join(chunk.payload for name, chunk in sent(rank, "reference") if name == "bo")
    reference, _ = from_bytes(chunks, HALF)
    assert reference.version == 1 and reference.optimizer.keys() == HALF.keys()
    assert all(torch.equal(t, rooms.aggregator.reference().weights[n]) for n, t in reference.weights.items())


@pytest.mark.parametrize(("mode", "shares"), [("synchronous", True), ("parallel", False)])
def test_moments_are_the_references_unless_halves_are_personal(
    monkeypatch: pytest.MonkeyPatch, mode: str, shares: bool
) -> None:
    config = run_config(clients={"expected": 1, "minimum": 1}, federation={"mode": mode})
    rank = Rank(monkeypatch, config, [FakeClient("ada", config)])
    weights = {name: torch.ones(shape) for name, shape in HALF.items()}
    moments = {n: {"step": torch.tensor(1.0), "exp_avg": t, "exp_avg_sq": t + 1.0} for n, t in weights.items()}
    rank.served.aggregator.load(Reference(1, weights, moments))
    rank.served.connect()
    reference, _ = from_bytes(b"".join(chunk.payload for _, chunk in sent(rank, "reference")), HALF)
    assert bool(reference.optimizer) == shares and rank.served.aggregator.reference().optimizer


@pytest.mark.parametrize("has_state", [False, True])
def test_after_a_checkpoint_was_loaded_a_client_begins_with_its_own_state_if_it_has_it(
    monkeypatch: pytest.MonkeyPatch, has_state: bool
) -> None:
    config = run_config(clients={"expected": 1, "minimum": 1}, federation={"mode": "parallel"})
    rank = Rank(monkeypatch, config, [FakeClient("ada", config)])
    rooms = rank.served.rooms
    rooms.members.note_states(["ada"], 0 if has_state else 5)
    rank.clients[0].states[0] = 0
    rooms.service.restored = 0
    rank.served.connect()
    assert begun(rank).reference != has_state
    assert bool(sent(rank, "reference")) != has_state
    rooms.service.roll_back(0)
    assert begun(rank).attempt == 1 and begun(rank).reference != has_state, "the same when windows are undone"


def rolled_back(rank: Rank) -> None:
    """Undo window 0 while both are in the middle of it; what they answer is kept in the network."""
    rooms = rank.served.rooms
    rooms.queue.roll_back(0, rank.clock.now)
    rooms.inbox.roll_back()
    rooms.cursors.roll_back()
    rooms.service.roll_back(0)


def test_a_roll_back_is_told_to_all_and_plans_are_forgotten(rank: Rank) -> None:
    service = rank.served.rooms.service
    while not service.plans:
        service.attend()
    service.norms[0] = 1.0
    rolled_back(rank)
    assert not service.plans and not service.norms
    assert [begun(rank, number) for number in (0, 1)] == [pb.Begin(attempt=1)] * 2
    while not service.plans:
        service.attend()
    assert all([m.window for m in client.manifests] == [0, 1, 0, 1][: len(client.manifests)] for client in rank.clients)


OLD = {
    "manifest": pb.ClientMessage(manifest=pb.Manifest(window=0, lengths=[4], masked=[1])),
    "activations": pb.ClientMessage(activations=pb.Activations(window=0, micro_batch=0)),
    "gradient": pb.ClientMessage(gradient=pb.Gradient(window=0, micro_batch=0)),
    "update": pb.ClientMessage(update=pb.UpdateChunk(window=0, last=True)),
    "saved": pb.ClientMessage(saved=pb.Saved(window=0)),
    "trained": pb.ClientMessage(trained=pb.Trained(window=0)),
    "older begun": pb.ClientMessage(begun=pb.Begun(attempt=0)),
}


@pytest.mark.parametrize("kind", OLD)
def test_what_a_client_sent_before_it_heard_of_a_roll_back_is_ignored(rank: Rank, kind: str) -> None:
    """Each of these would be refused, or kept, at this time."""
    rooms = rank.served.rooms
    rank.clients[1].handle = lambda message: []  # type: ignore[method-assign]
    rolled_back(rank)
    queue, kept = queue_state(rooms.queue), {name: repr(value) for name, value in vars(rooms.inbox).items()}
    for _ in range(1 if OLD[kind].HasField("begun") else 2):
        assert rooms.service.dispatch(Decoded("bo", OLD[kind], None))
    assert rank.clients[1].refusal is None and rooms.queue.clients == {"ada", "bo"}
    assert queue_state(rooms.queue) == queue
    assert {name: repr(value) for name, value in vars(rooms.inbox).items()} == kept
    assert rooms.cursors.committed == {}
    # Now it has heard of it.
    rooms.service.dispatch(Decoded("bo", pb.ClientMessage(begun=pb.Begun(attempt=1)), None))
    good = pb.Manifest(window=0, lengths=[3, 5, 2, 4], masked=[1, 2, 1, 2], cursor=cursor_at(4))
    rooms.service.dispatch(Decoded("bo", pb.ClientMessage(manifest=good), None))
    rooms.cursors.commit(0)
    assert rooms.cursors.committed["bo"]["position"] == 4
    if kind not in ("older begun",):
        rooms.service.dispatch(Decoded("bo", OLD[kind], None))
        assert rooms.queue.clients == {"ada"}, "and whatever is out of place counts again"


def test_only_the_last_of_two_roll_backs_counts(rank: Rank) -> None:
    rooms = rank.served.rooms
    rank.clients[1].handle = lambda message: []  # type: ignore[method-assign]
    rolled_back(rank)
    rolled_back(rank)
    rooms.service.dispatch(Decoded("bo", pb.ClientMessage(begun=pb.Begun(attempt=1)), None))
    rooms.service.dispatch(Decoded("bo", OLD["gradient"], None))
    assert rooms.queue.clients == {"ada", "bo"}, "it has not heard of the second"
    rooms.service.dispatch(Decoded("bo", pb.ClientMessage(begun=pb.Begun(attempt=2)), None))
    rooms.service.dispatch(Decoded("bo", OLD["gradient"], None))
    assert rooms.queue.clients == {"ada"}


def test_whoever_connects_after_a_roll_back_has_nothing_old_to_say(rank: Rank) -> None:
    rooms = rank.served.rooms
    rank.clients[1].handle = lambda message: []  # type: ignore[method-assign]
    rolled_back(rank)
    rooms.service.dispatch(Disconnected("bo"))
    rooms.service.dispatch(Connected("bo"))
    rooms.service.dispatch(Decoded("bo", OLD["gradient"], None))
    assert rooms.queue.clients == {"ada"}


def test_a_lost_connection_is_kept_in_mind_until_it_is_back(rank: Rank) -> None:
    service, membership = rank.served.rooms.service, rank.served.rooms.membership
    assert service.dispatch(Detached("bo")) and service.dispatch(Detached("nobody"))
    assert membership.detached == {"bo"} and rank.served.rooms.queue.clients == {"ada", "bo"}
    assert service.dispatch(Attached("bo"))
    assert membership.detached == set()
    service.dispatch(Detached("bo"))
    service.dispatch(Disconnected("bo"))
    assert membership.detached == set() and rank.served.rooms.queue.clients == {"ada"}
    assert service.dispatch(Attached("bo"))
    assert membership.detached == set()


def test_a_client_whose_next_process_waits_is_not_waited_for(rank: Rank) -> None:
    service, rooms = rank.served.rooms.service, rank.served.rooms
    assert service.dispatch(Knocked("bo")) and rooms.queue.clients == {"ada", "bo"}, "it is here"
    service.dispatch(Detached("bo"))
    assert service.dispatch(Knocked("bo")) and rooms.queue.clients == {"ada"}


def test_what_an_earlier_process_announced_is_not_asked_of_the_next(rank: Rank) -> None:
    rooms = rank.served.rooms
    while not rooms.service.plans:
        rooms.service.attend()
    rooms.membership.disconnect("bo")
    assert rooms.service.dispatch(Connected("bo"))
    assert [manifest.client for manifest in rooms.service.plans[0].manifests] == ["ada"]


def test_newcomers_are_awaited_where_the_run_says_so(rank: Rank) -> None:
    service, queue = rank.served.rooms.service, rank.served.rooms.queue
    service.dispatch(Disconnected("bo"))
    service.awaits_newcomers = False
    rank.clients[1].handle = lambda message: []  # type: ignore[method-assign]
    service.dispatch(Connected("bo"))
    assert queue.active == {"ada"} and queue.clients == {"ada", "bo"}
    service.dispatch(Disconnected("bo"))
    service.awaits_newcomers = True
    service.dispatch(Connected("bo"))
    assert queue.active == {"ada", "bo"}


def test_the_end_is_told_to_all(rank: Rank) -> None:
    rank.served.rooms.service.finish("the run is complete", complete=True)
    assert [(client.finish.reason, client.finish.complete) for client in rank.clients if client.finish] == [
        ("the run is complete", True)
    ] * 2


def test_who_begins_without_being_told_to_is_refused(rank: Rank) -> None:
    """Otherwise it could say so for ever, and be heard."""
    service, begun = rank.served.rooms.service, pb.ClientMessage(begun=pb.Begun(attempt=0))
    service.dispatch(Decoded("bo", begun, None))  # its answer to the Begin that it got
    service.take_in()
    service.dispatch(Decoded("bo", begun, None))
    assert [told.reason for name, told in sent(rank, "refused")] == ["client bo: it has begun, and nobody told it to"]


@pytest.mark.parametrize("event", [Knocked("eve"), Received("eve", pb.ClientMessage(), "a session that is over")])
def test_however_fast_events_come_the_body_is_looked_after(monkeypatch: pytest.MonkeyPatch, event: Event) -> None:
    config = run_config(clients={"expected": 2, "minimum": 1})
    rank = Rank(monkeypatch, config, [FakeClient("ada", config), FakeClient("bo", config)])
    rank.served.connect()
    taken = 0

    def flood(timeout: float) -> Event:
        nonlocal taken
        taken += 1
        assert taken < 10_000, "it takes them in for ever"
        return event

    monkeypatch.setattr(rank.endpoint, "next_event", flood)
    rank.served.rooms.service.take_in()
