"""Links to measure over: bytes arrive whole, in order, not before delay and rate allow; cuts happen
where asked."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from fedbert_ds.bench.network.link import DelayProxy, links_available, through


@pytest.fixture
def echo() -> Iterator[str]:
    """A server that sends back what it receives, until the other end stops sending."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def dial(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def round_trip(connection: socket.socket, payload: bytes) -> bytes:
    """Send, stop sending, and read to the end; what came before a cut if there is one."""

    def send() -> None:
        try:
            connection.sendall(payload)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    received = bytearray()
    try:
        while data := connection.recv(1 << 16):
            received += data
    except OSError:
        pass
    sender.join(timeout=30)
    return bytes(received)


@pytest.mark.parametrize(("delay_ms", "mbit"), [(0, None), (20, None), (10, 400)])
def test_bytes_arrive_whole_and_not_too_early(echo: str, delay_ms: float, mbit: float | None) -> None:
    payload = random.Random(1).randbytes(3_000_000)
    with DelayProxy(echo, delay_ms=delay_ms, mbit=mbit) as address, dial(address) as connection:
        started = time.monotonic()
        assert round_trip(connection, payload) == payload
        # A floor, which a slow machine does not break: two ways of delay, and the bytes at the
        # link's rate.
        assert time.monotonic() - started >= 2 * delay_ms / 1000 + (len(payload) * 8 / (mbit * 1e6) if mbit else 0)


def test_connections_share_nothing_but_the_proxy(echo: str) -> None:
    with DelayProxy(echo, mbit=800) as address:
        connections = [dial(address) for _ in range(8)]
        payloads = [random.Random(n).randbytes(200_000) for n in range(8)]
        results: dict[int, bytes] = {}
        threads = [
            threading.Thread(target=lambda n=n: results.update({n: round_trip(connections[n], payloads[n])}))
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert [results[n] for n in range(8)] == payloads
        for connection in connections:
            connection.close()


def test_a_connect_names_its_own_target(echo: str) -> None:
    with DelayProxy() as address, dial(address) as connection:
        assert through(address)["http_proxy"] == f"http://{address}"
        connection.sendall(f"CONNECT {echo} HTTP/1.1\r\nHost: {echo}\r\n\r\n".encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += connection.recv(100)
        assert answer.startswith(b"HTTP/1.1 200")
        assert round_trip(connection, b"hello") == b"hello"


def test_a_cut_comes_after_its_bytes_and_they_are_counted(echo: str) -> None:
    proxy = DelayProxy(echo, cut_bytes=(1000, 300_000), cuts=3, seed=4)
    payload = random.Random(2).randbytes(1_000_000)
    with proxy as address:
        for _ in range(3):
            with dial(address) as connection:
                received = round_trip(connection, payload)
                assert len(received) < 300_000 and payload.startswith(received)
        with dial(address) as connection:
            assert round_trip(connection, payload) == payload
        counts = proxy.counts()
        assert counts["connections"] == 4 and counts["cuts"] == 3
        assert 1_000_000 <= counts["bytes_up"] <= 1_900_000 and counts["bytes_down"] <= counts["bytes_up"]


def test_a_drop_cuts_all_and_the_link_is_down_for_a_while(echo: str) -> None:
    proxy = DelayProxy(echo)
    with proxy as address:
        with dial(address) as connection:
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
            proxy.drop(outage_ms=60_000)
            assert round_trip(connection, b"y") == b""
        with dial(address) as connection:
            assert round_trip(connection, b"z") == b""
        proxy.drop(outage_ms=0)
        with dial(address) as connection:
            assert round_trip(connection, b"z") == b"z"


def test_it_says_which_links_there_are() -> None:
    assert links_available() in ("netem", "proxy")
