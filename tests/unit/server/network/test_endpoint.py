"""The contract of both endpoints over real gRPC on loopback: joins, streams, refusals, floods."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from unit.server.network.loopback import KINDS, TIMEOUT, Listening, Stream, listening, manifest, save, session_of

from fedbert_ds.bench.network.link import DelayProxy
from fedbert_ds.errors import WireError
from fedbert_ds.server.network import endpoint_process
from fedbert_ds.server.network.endpoint_process import EndpointProcess
from fedbert_ds.server.network.events import (
    Attached,
    Connected,
    Detached,
    Disconnected,
    JoinAbandoned,
    JoinAsked,
    Received,
)
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.channel import TRAIN, connect
from fedbert_ds.wire.conversation import UNREAD_BYTES
from fedbert_ds.wire.introduction import KEY, introduced, join


@pytest.fixture(params=KINDS)
def endpoint(request: pytest.FixtureRequest) -> Iterator[Listening]:
    with listening(request.param) as started:
        yield started


@pytest.fixture
def streams(endpoint: Listening) -> Iterator[Callable[..., Stream]]:
    opened: list[Stream] = []

    def open_stream(client: str, session: str | None = None) -> Stream:
        opened.append(Stream(endpoint.address, client, session))
        return opened[-1]

    yield open_stream
    for stream in opened:
        stream.end()


# -- joins ----------------------------------------------------------------------------------------


def test_joins_wait_for_their_answers_and_each_gets_its_own(endpoint: Listening) -> None:
    with connect(endpoint.address, None) as channel:
        calls = {name: join(channel, pb.Hello(client=name), TIMEOUT) for name in ("ada", "bo")}
        asked = [endpoint.event(), endpoint.event()]
        assert not any(call.done() for call in calls.values())
        for event in asked:
            assert isinstance(event, JoinAsked)
            if event.hello.client == "ada":
                event.answer.set_result(pb.Welcome(endpoint="here", session="secret"))
            else:
                event.answer.set_exception(WireError("client bo has no text; check its --data"))
        assert calls["ada"].result(timeout=TIMEOUT) == pb.Welcome(endpoint="here", session="secret")
        error = calls["bo"].exception(timeout=TIMEOUT)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert error.details() == "client bo has no text; check its --data"


def test_a_join_that_is_given_up_is_an_event(endpoint: Listening) -> None:
    with connect(endpoint.address, None) as channel:
        call = join(channel, pb.Hello(client="ada"), TIMEOUT)
        asked = endpoint.event()
        assert isinstance(asked, JoinAsked)
        call.cancel()
        abandoned = endpoint.event()
        assert isinstance(abandoned, JoinAbandoned) and abandoned.hello is asked.hello
        assert asked.answer.cancelled()


# -- streams --------------------------------------------------------------------------------------


def test_a_stream_needs_its_own_session(streams, endpoint: Listening) -> None:
    strangers = [("ada", "session of bo"), ("ada", ""), ("cy", "session of cy"), ("cy", "")]
    for client, session in strangers:
        reason = streams(client, session).refusal()
        assert reason == f"client {client}: no such session at this endpoint; join the coordinator first"
    endpoint.no_event()


def test_nobody_may_open_a_stream_before_the_run_has_begun() -> None:
    endpoint = Listening()
    stream = Stream(endpoint.address, "ada", "")
    assert "no such session" in stream.refusal()
    stream.end()
    endpoint.real.stop(grace=0.1)


def test_a_stream_that_does_not_begin_with_attach_is_refused(endpoint: Listening) -> None:
    endpoint.real.admit({"": "", "ada": session_of("ada")})
    with connect(endpoint.address, None) as channel:
        for metadata in ([], introduced(pb.Attach()), [(KEY, b"\xff\xff\xff")], introduced(pb.Hello(client="ada"))):
            call = channel.stream_stream(TRAIN)(iter([manifest(0).SerializeToString()]), TIMEOUT, metadata=metadata)
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION, metadata
    endpoint.no_event()


def test_messages_go_both_ways_in_order(streams, endpoint: Listening) -> None:
    ada, bo = streams("ada"), streams("bo")
    assert {endpoint.event(), endpoint.event()} == {
        Connected("ada", session_of("ada")),
        Connected("bo", session_of("bo")),
    }
    up = down = 0
    for window in range(20):
        for name, stream in (("ada", ada), ("bo", bo)):
            message = manifest(window + 100 * (name == "bo"))
            stream.send(message)
            up += message.ByteSize()
            endpoint.real.send(name, save(window))
            down += save(window).ByteSize()
    got: dict[str, list[int]] = {"ada": [], "bo": []}
    for _ in range(40):
        event = endpoint.event()
        assert isinstance(event, Received)
        got[event.client].append(event.message.manifest.window)
    assert got == {"ada": list(range(20)), "bo": list(range(100, 120))}
    for stream in (ada, bo):
        assert [stream.receive().save.window for _ in range(20)] == list(range(20))
    assert endpoint.real.take_bytes() == (up, down)
    assert endpoint.real.take_bytes() == (0, 0)


def test_one_client_has_one_stream(streams, endpoint: Listening) -> None:
    """The newer connection has it. A stranger of the same name is refused before, at Join."""
    first = streams("ada")
    assert endpoint.event() == Connected("ada", session_of("ada"))
    endpoint.real.send("ada", save(1))
    assert first.receive() == save(1)
    with connect(endpoint.address, None) as channel:
        attach = pb.Attach(client="ada", session=session_of("ada"), received=1)
        # Open until the test ends: a client that has nothing more to say ends its connection.
        said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        call = channel.stream_stream(TRAIN)(iter(said.get, None), TIMEOUT, metadata=introduced(attach))
        greeting = pb.ServerMessage.FromString(next(call))
        assert greeting == pb.ServerMessage(attached=pb.Attached(), delivery=pb.Delivery())
        endpoint.real.send("ada", save(2))
        assert pb.ServerMessage.FromString(next(call)).save.window == 2
        endpoint.no_event()
        call.cancel()
        said.put(None)
    assert endpoint.event() == Detached("ada", session_of("ada")), "the newer one's end counts, the older one's did not"
    endpoint.no_event()


def test_a_connection_that_is_lost_and_back_is_told_and_nothing_else_is(endpoint: Listening) -> None:
    proxy = DelayProxy(endpoint.address)
    with proxy as through:
        ada = Stream(through, "ada")
        assert endpoint.event() == Connected("ada", session_of("ada"))
        endpoint.real.send("ada", save(1))
        assert ada.receive() == save(1)
        proxy.drop(outage_ms=0)
        assert endpoint.event() == Detached("ada", session_of("ada"))
        assert endpoint.event() == Attached("ada", session_of("ada"))
        ada.send(manifest(1))
        assert endpoint.event() == Received("ada", manifest(1), session_of("ada"))
        ada.end()
        assert endpoint.event() == Disconnected("ada", session=session_of("ada"))


def test_admit_adds_clients_and_changes_sessions(streams, endpoint: Listening) -> None:
    endpoint.real.admit({"cy": "session of cy"})
    ada = streams("ada")
    assert endpoint.event() == Connected("ada", session_of("ada"))
    streams("cy")
    assert endpoint.event() == Connected("cy", session_of("cy"))
    endpoint.real.admit({"bo": "another session"})
    endpoint.real.send("ada", save(1))
    assert ada.receive() == save(1), "who is here stays"
    assert "no such session" in streams("bo").refusal()
    streams("bo", "another session")
    assert endpoint.event() == Connected("bo", "another session")


def test_a_stream_of_an_earlier_session_ends(streams, endpoint: Listening) -> None:
    """Its process may live, and must not wait for ever."""
    before = streams("ada")
    assert endpoint.event() == Connected("ada", session_of("ada"))
    endpoint.real.admit({"ada": "another session"})
    assert "the server ended the stream" in before.refusal()
    assert endpoint.event() == Disconnected("ada", session=session_of("ada"))
    now = streams("ada", "another session")
    assert endpoint.event() == Connected("ada", "another session")
    endpoint.real.admit({"ada": "another session"})
    endpoint.real.send("ada", save(1))
    assert now.receive() == save(1)
    endpoint.no_event()


def test_a_client_takes_the_place_of_its_lost_process(streams, endpoint: Listening) -> None:
    """The server closes the stream of the one before and lets the other in by another session."""
    with DelayProxy(endpoint.address) as through:
        before = Stream(through, "ada")
        assert endpoint.event() == Connected("ada", session_of("ada"))
    assert endpoint.event() == Detached("ada", session_of("ada"))
    endpoint.real.close("ada", pb.ServerMessage(refused=pb.Refused(reason="it joins again")))
    endpoint.real.revoke("ada")
    endpoint.real.admit({"ada": "another session"})
    now = streams("ada", "another session")
    assert endpoint.event() == Connected("ada", "another session")
    endpoint.real.send("ada", save(1))
    assert now.receive() == save(1)
    before.end()
    endpoint.no_event()


def test_a_stream_that_ends_is_one_event_and_its_session_opens_no_other(streams, endpoint: Listening) -> None:
    first = streams("ada")
    assert endpoint.event() == Connected("ada", session_of("ada"))
    first.end()
    assert endpoint.event() == Disconnected("ada", session=session_of("ada"))
    endpoint.real.send("ada", save(1))  # to nobody
    assert "its session is over" in streams("ada").refusal()
    endpoint.no_event()
    endpoint.real.admit({"ada": "another session"})
    second = streams("ada", "another session")
    assert endpoint.event() == Connected("ada", "another session")
    endpoint.real.send("ada", save(2))
    assert second.receive() == save(2)
    second.end()
    assert endpoint.event() == Disconnected("ada", session="another session")
    endpoint.real.revoke("ada")
    endpoint.real.admit({})  # returns when the endpoint's process has heard what was said before
    assert "no such session" in streams("ada").refusal()
    endpoint.real.revoke("ada")


def test_close_says_a_last_word_and_leaves_no_stale_event(streams, endpoint: Listening) -> None:
    """The rank knows already; a Disconnected after the client is back would end the new stream."""
    first = streams("ada")
    assert endpoint.event() == Connected("ada", session_of("ada"))
    endpoint.real.send("ada", save(1))
    endpoint.real.close("ada", pb.ServerMessage(refused=pb.Refused(reason="so")))
    endpoint.real.send("ada", save(2))
    assert [first.receive().WhichOneof("body") for _ in range(2)] == ["save", "refused"]
    assert "the server ended the stream" in first.refusal()
    endpoint.real.admit({"ada": "another session"})
    second = streams("ada", "another session")
    assert endpoint.event() == Connected("ada", "another session")
    first.end()
    endpoint.no_event()
    endpoint.real.send("ada", save(3))
    assert second.receive() == save(3)
    endpoint.real.close("nobody", save(0))


def test_a_client_that_floods_is_slowed_down_and_others_are_served(
    streams, endpoint: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """UNREAD_BYTES and gRPC's own window bound what waits while nobody takes events."""
    flood, taken = 600, 0
    chunk = pb.UpdateChunk(payload=bytes(256 << 10))
    unread = UNREAD_BYTES // len(chunk.payload)
    in_process = isinstance(endpoint.real, EndpointProcess)
    monkeypatch.setattr(endpoint_process, "UNREAD_BYTES", UNREAD_BYTES)

    def requests() -> Iterator[bytes]:
        nonlocal taken
        while taken < flood:
            taken += 1
            yield pb.ClientMessage(update=chunk, delivery=pb.Delivery(sequence=taken)).SerializeToString()

    with connect(endpoint.address, None) as channel:
        attach = introduced(pb.Attach(client="ada", session=session_of("ada")))
        call = channel.stream_stream(TRAIN)(requests(), timeout=60, metadata=attach)
        assert endpoint.event() == Connected("ada", session_of("ada"))
        before, still = -1, 0
        deadline = time.monotonic() + TIMEOUT
        # Until the client has stood still for half a second.
        while still < 5 and time.monotonic() < deadline:
            still = still + 1 if taken == before else 0
            before = taken
            time.sleep(0.1)
        waits = unread + (endpoint_process.UNREAD_BYTES // len(chunk.payload) if in_process else 0)
        assert waits < taken < waits + 150 < flood, taken
        assert endpoint.real.num_waiting <= waits + 1
        streams("bo").send(manifest(7))
        events = [endpoint.event() for _ in range(flood + 2)]
        assert sum(isinstance(event, Received) and event.client == "ada" for event in events) == flood
        assert Received("bo", manifest(7), session_of("bo")) in events
        call.cancel()


def test_bytes_that_are_no_message_end_that_stream_alone(
    streams, endpoint: Listening, caplog: pytest.LogCaptureFixture
) -> None:
    bo = streams("bo")
    assert endpoint.event() == Connected("bo", session_of("bo"))
    attach = introduced(pb.Attach(client="ada", session=session_of("ada")))
    with connect(endpoint.address, None) as channel:
        raw = channel.stream_stream(TRAIN)
        with pytest.raises(grpc.RpcError, match="does not say who it is"):
            list(raw(iter([b"\xff\xff\xff"]), timeout=TIMEOUT))
        assert len(list(raw(iter([b"\xff\xff\xff"]), timeout=TIMEOUT, metadata=attach))) == 1
    assert [endpoint.event(), endpoint.event()] == [
        Connected("ada", session_of("ada")),
        Disconnected("ada", session=session_of("ada")),
    ]
    assert not caplog.records, "no traceback of ours for what somebody else sent"
    endpoint.real.send("bo", save(1))
    assert bo.receive() == save(1)
    bo.send(manifest(2))
    assert endpoint.event() == Received("bo", manifest(2), session_of("bo"))


def test_a_port_in_use_is_one_line(endpoint: Listening) -> None:
    kind = type(endpoint.real)
    other = kind("127.0.0.1", endpoint.port, None)
    with pytest.raises(WireError, match=rf"^127\.0\.0\.1:{endpoint.port}: the port is in use .*change server\.port"):
        other.start()
    other.stop(grace=0.1)
    foreign = kind("192.0.2.1", 0, None)
    with pytest.raises(WireError, match=r"or server\.host"):
        foreign.start()
    foreign.stop(grace=0.1)


def test_stop_may_be_called_before_start_and_twice_after(endpoint: Listening) -> None:
    type(endpoint.real)("127.0.0.1", 0, None).stop()
    endpoint.real.stop(grace=0.1)
    endpoint.real.stop(grace=0.1)
