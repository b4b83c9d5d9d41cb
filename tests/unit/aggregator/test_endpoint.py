"""Ranks and clients at one endpoint: who may say what, by session."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import grpc
import pytest

from fedbert_ds.aggregator.endpoint import AggregatorEndpoint, OpenAsked, Ordered
from fedbert_ds.certificates.authority import Authority
from fedbert_ds.errors import WireError
from fedbert_ds.server.network.door import DoorRules
from fedbert_ds.server.network.events import Connected, Disconnected, Received
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.aggregation import rank_name
from fedbert_ds.wire.channel import connect
from fedbert_ds.wire.introduction import open_run
from fedbert_ds.wire.stream import AggregatorStream, ControlStream
from fedbert_ds.wire.tls import TlsFiles

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
        assert endpoint.next_event(TIMEOUT) == Connected(RANK, "of rank 0")
        order = pb.Order(expect=pb.Expect(window=3, clients=["ada"]))
        rank.send(order)
        event = endpoint.next_event(TIMEOUT)
        assert isinstance(event, Ordered) and event.client == RANK and event.order.expect == order.expect
        report = pb.Report(combined=pb.Combined(window=3, norm=0.25))
        endpoint.report(RANK, report)
        assert rank.receive() == report
    assert endpoint.next_event(TIMEOUT) == Disconnected(RANK, session="of rank 0")


def test_only_the_last_session_of_each_is_heard(listening: tuple[AggregatorEndpoint, str]) -> None:
    endpoint, _ = listening
    assert endpoint.hears(Connected(RANK, "of rank 0")) and endpoint.hears(Connected("ada", "of ada"))
    assert endpoint.hears(None) and endpoint.hears(OpenAsked(pb.OpenRun(), Future()))
    assert not endpoint.hears(Disconnected(RANK, session="of the run before"))
    endpoint.admit({RANK: "of rank 0", "ada": "her next"})
    assert not endpoint.hears(Disconnected("ada", session="of ada")) and endpoint.hears(Connected("ada", "her next"))
    endpoint.admit({RANK: "the next"})
    assert not endpoint.hears(Received("ada", pb.ClientMessage(), "her next"))
    assert not endpoint.hears(Ordered(RANK, pb.Order(), "of rank 0"))


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
        assert endpoint.next_event(TIMEOUT) == Connected("ada", "of ada")
        client.send(pb.Order(finish=pb.Finish(complete=True)))
        event = endpoint.next_event(TIMEOUT)
        assert isinstance(event, Received) and event.message.WhichOneof("body") is None


def test_a_clients_messages_come_as_at_a_rank(listening: tuple[AggregatorEndpoint, str]) -> None:
    endpoint, address = listening
    with AggregatorStream(address, None, "ada", "of ada", shares_memory=False) as client:
        assert endpoint.next_event(TIMEOUT) == Connected("ada", "of ada")
        message = pb.ClientMessage(update=pb.UpdateChunk(window=1, name="table", payload=b"values"))
        client.send(message)
        assert endpoint.next_event(TIMEOUT) == Received("ada", message, "of ada")
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


def test_a_client_is_who_its_certificate_says(tmp_path: Path) -> None:
    """The server draws the sessions, so it could lend one to a client of its own; not a name."""
    authority = Authority(tmp_path)
    authority.create("an authority", 100)

    def files(name: str, hosts: list[str] | None = None) -> TlsFiles:
        certificate = authority.issue(name, 90, hosts=hosts)
        return TlsFiles(tmp_path / "ca.pem", certificate, certificate.with_suffix(".key"))

    rules = DoorRules(allowed=("ada",), revoked=authority.revocation_list)
    endpoint = AggregatorEndpoint("127.0.0.1", 0, files("sums", []), TIMEOUT, rules=rules)
    address = f"127.0.0.1:{endpoint.start()}"
    endpoint.admit({RANK: "of rank 0", "ada": "of ada", "bo": "of bo"})
    try:
        server, ada, bo = files("body", []), files("ada"), files("bo")
        for shown, client, reason in (
            (server, "ada", "client ada shows the certificate of body"),
            (bo, "ada", "client ada shows the certificate of bo"),
            (bo, "bo", "client bo is not on the run's list"),
        ):
            with (
                AggregatorStream(address, shown, client, f"of {client}", shares_memory=False) as stream,
                pytest.raises(WireError, match=reason),
            ):
                stream.receive()
        assert endpoint.next_event(0.1) is None
        with AggregatorStream(address, ada, "ada", "of ada", shares_memory=False):
            assert endpoint.next_event(TIMEOUT) == Connected("ada", "of ada")
        with ControlStream(address, server, RANK, "of rank 0", shares_memory=False):
            assert endpoint.next_event(TIMEOUT) == Disconnected("ada", session="of ada")
            assert endpoint.next_event(TIMEOUT) == Connected(RANK, "of rank 0")
        authority.revoke("body")
        with (
            connect(address, server) as channel,
            pytest.raises(grpc.RpcError, match="the certificate of body is revoked"),
        ):
            open_run(channel, pb.OpenRun(), TIMEOUT).result()
    finally:
        endpoint.stop(grace=0.1)
