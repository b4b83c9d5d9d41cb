"""A client's stream over links that break: nothing above notices, unless the link stays down for
too long.
"""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from fedbert_ds.bench.network.link import DelayProxy
from fedbert_ds.errors import ConnectionLost, WireError
from fedbert_ds.federation.client_update import UpdateAssembler, update_chunks
from fedbert_ds.server.network.endpoint import Endpoint
from fedbert_ds.server.network.events import Attached, Connected, Detached, Disconnected, Event, Received
from fedbert_ds.wire import channel as channel_module
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire import stream as stream_module
from fedbert_ds.wire.conversation import UNREAD_BYTES
from fedbert_ds.wire.stream import ServerStream

TIMEOUT = 60.0


def started(reconnect_timeout: float = TIMEOUT) -> tuple[Endpoint, str]:
    endpoint = Endpoint("127.0.0.1", 0, None, reconnect_timeout)
    port = endpoint.start()
    endpoint.admit({"ada": "session of ada"})
    return endpoint, f"127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over loopback a lost connection is dialled again sooner than over the internet."""
    monkeypatch.setattr(stream_module, "BACKOFF_SECONDS", (0.01, 1.0))


@pytest.fixture
def server() -> Iterator[tuple[Endpoint, str]]:
    endpoint, address = started()
    yield endpoint, address
    endpoint.stop(grace=0.1)


def stream_to(
    address: str,
    reconnect_timeout: float = TIMEOUT,
    shares_memory: bool = False,
    is_over: Callable[[], bool] | None = None,
) -> ServerStream:
    return ServerStream(address, None, "ada", "session of ada", reconnect_timeout, shares_memory, is_over=is_over)


def past_the_link(endpoint: Endpoint) -> Event | None:
    """The next event that is not about the connection alone."""
    while isinstance(event := endpoint.next_event(TIMEOUT), Detached | Attached):
        pass
    return event


def up(number: int, size: int = 0) -> pb.ClientMessage:
    return pb.ClientMessage(update=pb.UpdateChunk(offset=number, payload=bytes(size)))


def down(number: int, size: int = 0) -> pb.ServerMessage:
    return pb.ServerMessage(update=pb.UpdateChunk(offset=number, payload=bytes(size)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shares_memory", [False, True], ids=["socket", "shared"])
def test_cut_at_random_bytes_every_message_comes_once_and_in_order(
    server: tuple[Endpoint, str], seed: int, shares_memory: bool
) -> None:
    """Sizes from nothing to beyond the smallest piece between two cuts, both ways at once."""
    endpoint, address = server
    chance = random.Random(seed)
    sizes = [chance.choice([0, 10, 1_000, 50_000, 300_000]) for _ in range(120)]
    # What lies in shared memory does not cross the link.
    cut_bytes = (1_000, 10_000) if shares_memory else (1_000, 1_500_000)
    proxy = DelayProxy(address, cut_bytes=cut_bytes, cuts=12, seed=seed)
    with proxy as through, stream_to(through, shares_memory=shares_memory) as stream:
        assert endpoint.next_event(TIMEOUT) == Connected("ada", "session of ada")
        for number, size in enumerate(sizes):
            endpoint.send("ada", down(number, size))

        def talk() -> None:
            for number, size in enumerate(sizes):
                stream.send(up(number, size))

        talker = threading.Thread(target=talk, daemon=True)
        talker.start()
        for number, size in enumerate(sizes):
            assert past_the_link(endpoint) == Received("ada", up(number, size), "session of ada")
            assert stream.receive() == down(number, size)
        talker.join(timeout=TIMEOUT)
        assert proxy.counts()["cuts"] > 3
    assert past_the_link(endpoint) == Disconnected("ada", session="session of ada")
    assert endpoint.next_event(0) is None


def test_an_update_whose_link_drops_in_the_middle_goes_on_where_it_was(server: tuple[Endpoint, str]) -> None:
    """30 MB up in chunks of 1 MB: what is sent again is less than what may be under way, not the
    update.
    """
    endpoint, address = server
    update = {"table": torch.randn(7_000_000 // 768, 768), "bias": torch.randn(768)}
    proxy = DelayProxy(address, mbit=2_000, cut_bytes=(14_000_000, 16_000_000), cuts=1)
    with proxy as through, stream_to(through) as stream:
        assert endpoint.next_event(TIMEOUT) == Connected("ada", "session of ada")

        def talk() -> None:
            for chunk in update_chunks(0, update.items()):
                stream.send(pb.ClientMessage(update=chunk))

        talker = threading.Thread(target=talk, daemon=True)
        talker.start()
        assembler = UpdateAssembler({name: tuple(tensor.shape) for name, tensor in update.items()}, "ada")
        complete = None
        while complete is None:
            event = past_the_link(endpoint)
            assert isinstance(event, Received), event
            complete = assembler.add(event.message.update)
        talker.join(timeout=TIMEOUT)
        assert all(torch.equal(complete[name], update[name]) for name in update)
        assert proxy.counts()["cuts"] == 1
        assert 0 < stream.resent_bytes < 14_000_000


def test_who_does_not_come_back_is_told_after_the_grace_and_refused_then() -> None:
    endpoint, address = started(reconnect_timeout=0.3)
    proxy = DelayProxy(address)
    with proxy as through, stream_to(through) as stream:
        assert endpoint.next_event(TIMEOUT) == Connected("ada", "session of ada")
        endpoint.send("ada", down(1))
        assert stream.receive() == down(1)
        proxy.drop(outage_ms=3_600_000)
        assert endpoint.next_event(TIMEOUT) == Detached("ada", "session of ada")
        assert endpoint.next_event(TIMEOUT) == Disconnected("ada", session="session of ada")
        proxy.drop(outage_ms=0)
        with pytest.raises(ConnectionLost, match="its session is over; it was away for too long"):
            stream.receive()
    endpoint.stop(grace=0.1)


def test_a_link_that_stays_down_is_one_line(server: tuple[Endpoint, str]) -> None:
    endpoint, address = server
    proxy = DelayProxy(address)
    with proxy as through, stream_to(through, reconnect_timeout=0.3) as stream:
        assert endpoint.next_event(TIMEOUT) == Connected("ada", "session of ada")
        proxy.drop(outage_ms=3_600_000)
        with pytest.raises(ConnectionLost, match=r"connection lost \(unavailable: .*; start this client again"):
            stream.receive()
        stream.send(up(1))  # lost, and no wait for ever
    assert endpoint.next_event(TIMEOUT) == Detached("ada", "session of ada")
    assert endpoint.next_event(0) is None, "the server still waits for it"


# -- a session that is over ------------------------------------------------------------------------

OVER = r"connection lost, and the run has ended or started again since; start this client again"


def test_a_lost_connection_is_given_up_once_its_session_is_over(
    server: tuple[Endpoint, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, however long this side waits before it dials again."""
    monkeypatch.setattr(stream_module, "BACKOFF_SECONDS", (3600.0, 3600.0))
    endpoint, address = server
    over = threading.Event()
    proxy = DelayProxy(address)
    with proxy as through, stream_to(through, 3600.0, is_over=over.is_set) as stream:
        assert isinstance(endpoint.next_event(TIMEOUT), Connected)
        proxy.drop(outage_ms=3_600_000)
        assert isinstance(endpoint.next_event(TIMEOUT), Detached)
        over.set()
        with pytest.raises(ConnectionLost, match=OVER):
            stream.receive()


def test_a_dial_under_way_is_given_up_once_its_session_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a machine that does not answer; gRPC alone would wait for it here for an hour."""
    patient = [*channel_module.CLIENT_OPTIONS, ("grpc.min_reconnect_backoff_ms", 3_600_000)]
    monkeypatch.setattr(channel_module, "CLIENT_OPTIONS", patient)
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with stream_to(address, 3600.0, is_over=over.is_set) as stream:
            line, _ = silent.accept()
            over.set()
            with pytest.raises(ConnectionLost, match=OVER):
                stream.receive()
            line.close()


def test_a_connection_is_left_alone_though_its_session_be_over(server: tuple[Endpoint, str]) -> None:
    """Until it is lost."""
    endpoint, address = server
    over = threading.Event()
    proxy = DelayProxy(address)
    with proxy as through, stream_to(through, 3600.0, is_over=over.is_set) as stream:
        assert isinstance(endpoint.next_event(TIMEOUT), Connected)
        endpoint.send("ada", down(1))
        assert stream.receive() == down(1)
        over.set()
        assert endpoint.next_event(5 * stream_module.ASK_SECONDS) is None
        endpoint.send("ada", down(2))
        assert stream.receive() == down(2)
        proxy.drop(outage_ms=3_600_000)
        with pytest.raises(ConnectionLost, match=OVER):
            stream.receive()


def test_a_cut_is_dialled_again_while_the_session_is_not_over(server: tuple[Endpoint, str]) -> None:
    endpoint, address = server
    asked = threading.Semaphore(0)

    def is_over() -> bool:
        asked.release()
        return False

    proxy = DelayProxy(address)
    with proxy as through, stream_to(through, 3600.0, is_over=is_over) as stream:
        assert isinstance(endpoint.next_event(TIMEOUT), Connected)
        endpoint.send("ada", down(1))
        assert stream.receive() == down(1)
        proxy.drop(outage_ms=3_600_000)
        assert isinstance(endpoint.next_event(TIMEOUT), Detached)
        while asked.acquire(blocking=False):
            pass
        assert all(asked.acquire(timeout=TIMEOUT) for _ in range(3))
        proxy.drop(outage_ms=0)
        assert isinstance(endpoint.next_event(TIMEOUT), Attached)
        endpoint.send("ada", down(2))
        assert stream.receive() == down(2)


def test_who_hears_that_it_is_over_after_it_was_attached_goes_on(server: tuple[Endpoint, str]) -> None:
    """The file is read while the server takes the stream: the stream knows better."""
    endpoint, address = server
    answer, asking = threading.Event(), list[threading.Thread]()

    def is_over() -> bool:
        asking.append(threading.current_thread())
        return answer.wait(TIMEOUT)

    with stream_to(address, 3600.0, is_over=is_over) as stream:
        assert isinstance(endpoint.next_event(TIMEOUT), Connected)
        endpoint.send("ada", down(1))
        assert stream.receive() == down(1)
        answer.set()
        asking[0].join(TIMEOUT)
        assert not asking[0].is_alive()
        endpoint.send("ada", down(2))
        assert stream.receive() == down(2)


def test_who_leaves_is_told_at_once_and_what_it_said_comes_before(server: tuple[Endpoint, str]) -> None:
    endpoint, address = server
    with stream_to(address) as stream:
        for number in range(50):
            stream.send(up(number, 10_000))
    assert endpoint.next_event(TIMEOUT) == Connected("ada", "session of ada")
    for number in range(50):
        assert endpoint.next_event(TIMEOUT) == Received("ada", up(number, 10_000), "session of ada")
    assert endpoint.next_event(TIMEOUT) == Disconnected("ada", session="session of ada")


def test_the_last_word_comes_over_a_link_that_drops(server: tuple[Endpoint, str]) -> None:
    endpoint, address = server
    proxy = DelayProxy(address)
    with proxy as through, stream_to(through) as stream:
        assert endpoint.next_event(TIMEOUT) == Connected("ada", "session of ada")
        proxy.drop(outage_ms=300)
        endpoint.send("ada", down(1))
        endpoint.close("ada", pb.ServerMessage(finish=pb.Finish(reason="done", complete=True)))
        endpoint.revoke("ada")
        assert stream.receive() == down(1)
        assert stream.receive().finish.reason == "done"
        with pytest.raises(WireError, match="the server ended the stream"):
            stream.receive()
    # The loss may be noticed before the client is revoked, and nothing is told of it after that.
    assert endpoint.next_event(0) in (None, Detached("ada", "session of ada"))
    assert endpoint.next_event(0) is None
    endpoint.stop(grace=0.1)


def test_stop_waits_for_the_last_words(server: tuple[Endpoint, str]) -> None:
    endpoint, address = server
    with stream_to(address) as stream:
        assert endpoint.next_event(TIMEOUT) == Connected("ada", "session of ada")
        for number in range(10):
            endpoint.send("ada", down(number, 1_000_000))
        endpoint.close("ada", down(10))
        endpoint.stop(grace=30)
        assert [stream.receive().update.offset for _ in range(11)] == list(range(11))


def test_send_waits_while_too_much_is_under_way(server: tuple[Endpoint, str], monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint, address = server
    monkeypatch.setattr(stream_module, "KEPT_BYTES", 4 << 20)
    sent = 0
    count = (UNREAD_BYTES + (24 << 20)) >> 20
    finished = threading.Event()

    def talk() -> None:
        nonlocal sent
        for number in range(count):
            stream.send(up(number, 1 << 20))
            sent += 1
        finished.set()

    with stream_to(address) as stream:
        threading.Thread(target=talk, daemon=True).start()
        assert endpoint.next_event(TIMEOUT) == Connected("ada", "session of ada")
        assert not finished.wait(timeout=1.0), "more was taken from the client than may be under way"
        assert sent <= (UNREAD_BYTES >> 20) + 8
        # A message that comes meanwhile is not stuck behind what waits.
        for number in range(40):
            endpoint.send("ada", down(number, 1 << 20))
        for number in range(count):
            assert endpoint.next_event(TIMEOUT) == Received("ada", up(number, 1 << 20), "session of ada")
        assert finished.wait(timeout=TIMEOUT)
        assert [stream.receive().update.offset for _ in range(40)] == list(range(40))
