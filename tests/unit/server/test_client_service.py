"""What a rank does for its clients beside the body: events in, plans and credit out, updates handed
on.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from unit.server.fake_client import HALF, FakeClient
from unit.server.fakes import Rank, hello_of, joined, run_config

from fedbert_ds.errors import WireError
from fedbert_ds.federation.client_update import update_chunks
from fedbert_ds.server.network.events import JoinAbandoned, Received
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
    rooms.exchange.expect(0, ["ada", "bo"], average=False)
    for client, value in (("ada", 1.0), ("bo", 2.0)):
        tensors = {name: torch.full(shape, value) for name, shape in HALF.items()}
        for chunk in update_chunks(0, tensors.items(), 1.0):
            rank.endpoint.post(client, Received(client, pb.ClientMessage(update=chunk)))
    rooms.service.finish_exchanges()
    for client in rank.clients:
        assert all(torch.equal(client.updates[-1][name], torch.full(shape, 3.0)) for name, shape in HALF.items())
    assert rooms.aggregator.reference().version == 1, "and to the aggregator"


def test_an_update_that_is_not_sound_costs_its_client_alone(rank: Rank) -> None:
    rooms = rank.served.rooms
    rooms.exchange.expect(0, ["ada", "bo"], average=False)

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


def test_the_end_is_told_to_all(rank: Rank) -> None:
    rank.served.rooms.service.finish("the run is complete", complete=True)
    assert [(client.finish.reason, client.finish.complete) for client in rank.clients if client.finish] == [
        ("the run is complete", True)
    ] * 2
