"""A link is cut where asked, is down as long as asked, and counts what crossed it."""

from __future__ import annotations

import random

from fedbert_ds.bench.network.link import DelayProxy


def test_a_cut_comes_after_its_bytes_and_they_are_counted(dial, round_trip, echo: str) -> None:
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


def test_a_drop_cuts_all_and_the_link_is_down_for_a_while(dial, round_trip, echo: str) -> None:
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
