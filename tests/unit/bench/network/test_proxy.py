"""Bytes arrive whole and in order, and not before delay and rate allow."""

from __future__ import annotations

import random
import threading
import time

import pytest

from fedbert_ds.bench.network.link import DelayProxy, through


@pytest.mark.parametrize(("delay_ms", "mbit"), [(0, None), (20, None), (10, 400)])
def test_bytes_arrive_whole_and_not_too_early(dial, round_trip, echo: str, delay_ms: float, mbit: float | None) -> None:
    payload = random.Random(1).randbytes(3_000_000)
    with DelayProxy(echo, delay_ms=delay_ms, mbit=mbit) as address, dial(address) as connection:
        started = time.monotonic()
        assert round_trip(connection, payload) == payload
        # A floor, which a slow machine does not break: two ways of delay, and the bytes at the
        # link's rate.
        assert time.monotonic() - started >= 2 * delay_ms / 1000 + (len(payload) * 8 / (mbit * 1e6) if mbit else 0)


def test_connections_share_nothing_but_the_proxy(dial, round_trip, echo: str) -> None:
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


def test_a_connect_names_its_own_target(dial, round_trip, echo: str) -> None:
    with DelayProxy() as address, dial(address) as connection:
        assert through(address)["http_proxy"] == f"http://{address}"
        connection.sendall(f"CONNECT {echo} HTTP/1.1\r\nHost: {echo}\r\n\r\n".encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += connection.recv(100)
        assert answer.startswith(b"HTTP/1.1 200")
        assert round_trip(connection, b"hello") == b"hello"
