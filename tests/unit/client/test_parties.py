"""Two conversations as one: what goes where, what may come from whom, and in which order a save."""

from __future__ import annotations

import queue
import threading
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
        self._asked = threading.Semaphore(0)

    def send(self, message: pb.ClientMessage) -> None:
        self.sent.append(message)

    def receive(self) -> pb.ServerMessage:
        self._asked.release()
        message = self.incoming.get()
        if isinstance(message, WireError):
            raise message
        return message

    def listened_to(self, num: int) -> None:
        """Wait until so many more messages are where `Parties.receive` finds them."""
        for _ in range(num):
            assert self._asked.acquire(timeout=30.0)


def pair(first_window: int | None = 0, **federation: Any) -> tuple[FakeStream, FakeStream, Parties]:
    """Of a client that has begun with a state of `first_window`; with None, of one that has not."""
    server, aggregator = FakeStream(), FakeStream()
    strategy = strategy_of(FederationSection(**federation), WireSection())
    parties = Parties(server, aggregator, strategy)
    if first_window is not None:
        server.incoming.put(begin(first_window))
        aggregator.incoming.put(mark(first_window))
        assert parties.receive() == begin(first_window)
    return server, aggregator, parties


def begin(window: int, next_window: int = 9, reference: bool = False, attempt: int = 0) -> pb.ServerMessage:
    """The server's."""
    begun = pb.Begin(window=window, next_window=next_window, reference=reference, attempt=attempt)
    return pb.ServerMessage(begin=begun)


def mark(window: int, attempt: int = 0) -> pb.ServerMessage:
    """The aggregator's Begin."""
    return pb.ServerMessage(begin=pb.Begin(window=window, attempt=attempt))


def reference(last: bool = True) -> pb.ServerMessage:
    return pb.ServerMessage(reference=pb.ReferenceChunk(last=last))


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
    begun = pb.ClientMessage(begun=pb.Begun(attempt=2))
    for message in [chunk, *others, begun]:
        parties.send(message)
    assert aggregator.sent == [chunk, begun] and server.sent == [*others, begun], "both know what comes after"


def test_messages_of_both_are_received() -> None:
    server, aggregator, parties = pair()
    server.incoming.put(PLAN)
    aggregator.incoming.put(update(0))
    received = [parties.receive() for _ in range(2)]
    assert PLAN in received and update(0) in received


def test_a_reference_waits_for_the_begin_that_announces_it_which_takes_its_window() -> None:
    server, aggregator, parties = pair(first_window=None)
    for message in (mark(4), reference(last=False), reference(), update(4)):
        aggregator.incoming.put(message)
    server.incoming.put(begin(0, reference=True))
    expected = [begin(4, reference=True), reference(last=False), reference(), update(4)]
    assert [parties.receive() for _ in expected] == expected


def test_a_begin_waits_for_its_reference_and_the_server_for_the_whole_of_it() -> None:
    server, aggregator, parties = pair(first_window=None)
    for message in (begin(0, reference=True), save(6), PLAN):
        server.incoming.put(message)
    for message in (mark(5), reference(last=False), reference()):
        aggregator.incoming.put(message)
    expected = [begin(5, reference=True), reference(last=False), reference(), PLAN]
    assert [parties.receive() for _ in expected] == expected
    aggregator.incoming.put(update(5))
    assert [parties.receive(), parties.receive()] == [update(5), save(6)], "window 5 is not in the reference"


def test_a_begin_with_a_state_of_ones_own_keeps_its_window() -> None:
    server, aggregator, parties = pair(first_window=None)
    server.incoming.put(begin(3))
    aggregator.incoming.put(mark(2))
    assert parties.receive() == begin(3), "windows after which nothing is exchanged are not in the reference"


@pytest.mark.parametrize("first", ["server", "aggregator", "between"])
@pytest.mark.parametrize("has_reference", [False, True])
def test_after_a_roll_back_nothing_of_windows_that_were_undone_is_handed_on(first: str, has_reference: bool) -> None:
    server, aggregator, parties = pair()
    of_server = [begin(2, reference=has_reference, attempt=1), PLAN]
    of_aggregator = [mark(2, attempt=1), *[reference()] * has_reference, update(2)]
    undone = [update(1, last=False), update(1)]
    expected = [of_server[0], *[reference()] * has_reference, update(2), PLAN]
    if first == "server":
        server.listened_to(2)  # for the first Begin, and for what comes next
        for message in of_server:
            server.incoming.put(message)
        server.listened_to(len(of_server))
        for message in [*undone, *of_aggregator]:
            aggregator.incoming.put(message)
    else:
        for message in undone:  # they came in time to count as not undone yet
            aggregator.incoming.put(message)
        assert [parties.receive() for _ in undone] == undone
        for message in of_aggregator:
            aggregator.incoming.put(message)
        if first == "between":
            server.incoming.put(save(1))  # of a window that is undone
        for message in of_server:
            server.incoming.put(message)
        if first == "between":
            assert parties.receive() == save(1)
    got = [parties.receive() for _ in expected]
    assert got[: 1 + has_reference] == expected[: 1 + has_reference]
    assert all(message in got for message in expected)


def test_of_two_begins_the_later_one_counts() -> None:
    """The client was on its way to the aggregator when windows were undone: it hears of the last
    time only.
    """
    server, aggregator, parties = pair(first_window=None)
    for message in (begin(4, reference=True), begin(3, reference=True, attempt=1), PLAN):
        server.incoming.put(message)
    for message in (mark(3, attempt=1), reference()):
        aggregator.incoming.put(message)
    expected = [begin(3, reference=True, attempt=1), reference(), PLAN]
    assert [parties.receive() for _ in expected] == expected


def test_a_begin_of_before_the_roll_back_is_passed_over_with_all_that_follows() -> None:
    server, aggregator, parties = pair(first_window=None)
    server.incoming.put(begin(3, reference=True, attempt=1))
    for message in (mark(5), reference(last=False), reference(), update(5), mark(3, attempt=1), reference()):
        aggregator.incoming.put(message)
    expected = [begin(3, reference=True, attempt=1), reference()]
    assert [parties.receive() for _ in expected] == expected


def test_the_servers_last_word_waits_for_nothing() -> None:
    server, _, parties = pair(first_window=None)
    finish = pb.ServerMessage(finish=pb.Finish(reason="stopped"))
    server.incoming.put(begin(0, reference=True))
    server.incoming.put(finish)
    assert parties.receive() == finish


def test_a_reference_that_no_begin_announced_is_an_error() -> None:
    _, aggregator, parties = pair()
    aggregator.incoming.put(reference())
    with pytest.raises(WireError, match="to a client that has one"):
        parties.receive()


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
    server, aggregator, parties = pair()
    aggregator.incoming.put(pb.ServerMessage(refused=pb.Refused(reason="lost its connection")))
    refused = pb.ServerMessage(refused=pb.Refused(reason="it was lost", may_return=True))
    server.incoming.put(refused)
    assert parties.receive() == refused, "the server knows whether it may return"
    monkeypatch.setattr(parties_module, "LAST_WORD_SECONDS", 0.05)
    _, aggregator, parties = pair()
    aggregator.incoming.put(WireError("no aggregator"))
    with pytest.raises(WireError, match="no aggregator"):
        parties.receive()
