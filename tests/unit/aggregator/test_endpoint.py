"""Ranks and clients at one endpoint: who may say what, by session."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from fedbert_ds.aggregator.endpoint import AggregatorEndpoint, OpenAsked, Ordered
from fedbert_ds.errors import WireError
from fedbert_ds.server.network.events import Connected, Disconnected, Received
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.aggregation import rank_name
from fedbert_ds.wire.channel import connect
from fedbert_ds.wire.introduction import open_run
from fedbert_ds.wire.stream import AggregatorStream, ControlStream

TIMEOUT = 30.0
RANK = rank_name(0)


@pytest.fixture
def listening() -> Iterator[tuple[AggregatorEndpoint, str]]:
    endpoint = AggregatorEndpoint("127.0.0.1", 0, None, TIMEOUT)
    port = endpoint.start()
    endpoint.admit({RANK: "of rank 0", "ada": "of ada"})
    yield endpoint, f"127.0.0.1:{port}"
    endpoint.stop(grace=0.1)


def test_a_rank_gives_orders_and_gets_reports(listening: tuple[AggregatorEndpoint, str]) -> None:
    endpoint, address = listening
    with ControlStream(address, None, RANK, "of rank 0", shares_memory=False) as rank:
        assert endpoint.next_event(TIMEOUT) == Connected(RANK)
        order = pb.Order(expect=pb.Expect(window=3, clients=["ada"]))
        rank.send(order)
        event = endpoint.next_event(TIMEOUT)
        assert isinstance(event, Ordered) and event.rank == RANK and event.order.expect == order.expect
        report = pb.Report(combined=pb.Combined(window=3, norm=0.25))
        endpoint.report(RANK, report)
        assert rank.receive() == report
    assert endpoint.next_event(TIMEOUT) == Disconnected(RANK)


@pytest.mark.parametrize("session", ["of ada", "", "of rank 1"])
def test_nobody_is_a_rank_without_its_session(listening: tuple[AggregatorEndpoint, str], session: str) -> None:
    endpoint, address = listening
    with (
        ControlStream(address, None, RANK, session, shares_memory=False) as rank,
        pytest.raises(WireError, match="the aggregator refused this rank"),
    ):
        rank.receive()
    assert endpoint.next_event(0.1) is None


def test_a_client_is_a_client_on_any_call(listening: tuple[AggregatorEndpoint, str]) -> None:
    """It cannot give orders by dialling the ranks' call."""
    endpoint, address = listening

    class Disguised(ControlStream):
        pass

    with Disguised(address, None, "ada", "of ada", shares_memory=False) as client:
        assert endpoint.next_event(TIMEOUT) == Connected("ada")
        client.send(pb.Order(finish=pb.Finish(complete=True)))
        event = endpoint.next_event(TIMEOUT)
        assert isinstance(event, Received) and event.message.WhichOneof("body") is None


def test_a_clients_messages_come_as_at_a_rank(listening: tuple[AggregatorEndpoint, str]) -> None:
    endpoint, address = listening
    with AggregatorStream(address, None, "ada", "of ada", shares_memory=False) as client:
        assert endpoint.next_event(TIMEOUT) == Connected("ada")
        message = pb.ClientMessage(update=pb.UpdateChunk(window=1, name="table", payload=b"values"))
        client.send(message)
        assert endpoint.next_event(TIMEOUT) == Received("ada", message)
        answer = pb.ServerMessage(update=pb.UpdateChunk(window=1, last=True))
        endpoint.send("ada", answer)
        assert client.receive() == answer
        up, down = endpoint.take_bytes()
        assert (up, down) == (message.ByteSize(), answer.ByteSize())
        endpoint.close("ada", pb.ServerMessage(finish=pb.Finish(reason="done")))
        assert client.receive().finish.reason == "done"


def test_open_waits_for_its_answer(listening: tuple[AggregatorEndpoint, str]) -> None:
    endpoint, address = listening
    answers: list[pb.Opened] = []

    def call() -> None:
        with connect(address, None) as channel:
            answers.append(open_run(channel, pb.OpenRun(ranks=2), TIMEOUT).result())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    event = endpoint.next_event(TIMEOUT)
    assert isinstance(event, OpenAsked) and event.request.ranks == 2
    event.answer.set_result(pb.Opened(sessions=["a", "b"]))
    thread.join(timeout=TIMEOUT)
    assert answers == [pb.Opened(sessions=["a", "b"])]
