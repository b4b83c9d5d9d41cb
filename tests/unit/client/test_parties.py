"""Two conversations as one: what goes where, what may come from whom, and in which order a save."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from fedbert_ds.client import parties as parties_module
from fedbert_ds.client.parties import Parties
from fedbert_ds.config import FederationSection, WireSection
from fedbert_ds.errors import WireError
from fedbert_ds.federation.strategy import strategy_of
from fedbert_ds.wire import fedbert_pb2 as pb

PLAN = pb.ServerMessage(plan=pb.Plan(window=0, next_window=1))


class FakeStream:
    def __init__(self) -> None:
        self.sent: list[pb.ClientMessage] = []
        self.incoming: queue.SimpleQueue[pb.ServerMessage | WireError] = queue.SimpleQueue()

    def send(self, message: pb.ClientMessage) -> None:
        self.sent.append(message)

    def receive(self) -> pb.ServerMessage:
        message = self.incoming.get(timeout=30.0)
        if isinstance(message, WireError):
            raise message
        return message


def pair(first_window: int = 0, **federation: Any) -> tuple[FakeStream, FakeStream, Parties]:
    server, aggregator = FakeStream(), FakeStream()
    strategy = strategy_of(FederationSection(**federation), WireSection())
    return server, aggregator, Parties(server, aggregator, strategy, first_window)


def update(window: int, last: bool = True) -> pb.ServerMessage:
    return pb.ServerMessage(update=pb.UpdateChunk(window=window, last=last))


def save(window: int) -> pb.ServerMessage:
    return pb.ServerMessage(save=pb.Save(window=window))


def test_updates_go_to_the_aggregator_and_all_else_to_the_server() -> None:
    server, aggregator, parties = pair()
    chunk = pb.ClientMessage(update=pb.UpdateChunk(window=0, name="table"))
    others = [
        pb.ClientMessage(manifest=pb.Manifest()),
        pb.ClientMessage(activations=pb.Activations()),
        pb.ClientMessage(gradient=pb.Gradient()),
        pb.ClientMessage(saved=pb.Saved()),
    ]
    for message in [chunk, *others]:
        parties.send(message)
    assert aggregator.sent == [chunk] and server.sent == others


def test_messages_of_both_are_received() -> None:
    server, aggregator, parties = pair()
    reference = pb.ServerMessage(reference=pb.ReferenceChunk(last=True))
    server.incoming.put(PLAN)
    aggregator.incoming.put(reference)
    received = [parties.receive() for _ in range(2)]
    assert PLAN in received and reference in received


@pytest.mark.parametrize("kind", ["update", "reference", "update_request"])
def test_the_server_has_nothing_to_say_about_the_client_model(kind: str) -> None:
    server, _, parties = pair()
    message = pb.ServerMessage()
    getattr(message, kind).SetInParent()
    server.incoming.put(message)
    with pytest.raises(WireError, match=f"the server sent a message of kind {kind}, which is the aggregator's"):
        parties.receive()


def test_the_aggregator_has_nothing_to_say_about_the_body() -> None:
    _, aggregator, parties = pair()
    aggregator.incoming.put(PLAN)
    with pytest.raises(WireError, match="the aggregator sent a message of kind plan, which is the server's"):
        parties.receive()


def test_a_save_waits_for_the_update_of_the_window_before_it() -> None:
    server, aggregator, parties = pair()
    server.incoming.put(save(1))
    server.incoming.put(PLAN)
    assert parties.receive() == PLAN, "others pass it"
    aggregator.incoming.put(update(0, last=False))
    aggregator.incoming.put(update(0))
    assert [parties.receive() for _ in range(3)] == [update(0, last=False), update(0), save(1)]


def test_a_save_waits_for_no_window_without_an_exchange() -> None:
    server, aggregator, parties = pair(first_window=4, mode="parallel", average_every=3)
    server.incoming.put(save(5))
    assert parties.receive() == save(5)
    server.incoming.put(save(7))
    server.incoming.put(PLAN)
    assert parties.receive() == PLAN
    aggregator.incoming.put(update(5))
    assert [parties.receive(), parties.receive()] == [update(5), save(7)]


def test_the_servers_end_is_the_end() -> None:
    server, _, parties = pair()
    server.incoming.put(WireError("the server is gone"))
    with pytest.raises(WireError, match="the server is gone"):
        parties.receive()


def test_after_the_aggregators_end_the_server_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    server, aggregator, parties = pair()
    finish = pb.ServerMessage(finish=pb.Finish(reason="the aggregator is lost"))
    aggregator.incoming.put(WireError("no aggregator"))
    server.incoming.put(finish)
    assert parties.receive() == finish
    server, aggregator, parties = pair()
    aggregator.incoming.put(pb.ServerMessage(finish=pb.Finish(reason="the server is gone", complete=False)))
    server.incoming.put(PLAN)
    assert parties.receive() == PLAN, "only the server ends the run"
    monkeypatch.setattr(parties_module, "LAST_WORD_SECONDS", 0.05)
    _, aggregator, parties = pair()
    aggregator.incoming.put(WireError("no aggregator"))
    with pytest.raises(WireError, match="no aggregator"):
        parties.receive()
