"""Calls by address: how many at once, how many a second, and how much is remembered."""

from __future__ import annotations

import pytest

from fedbert_ds.server.network import call_rate
from fedbert_ds.server.network.call_rate import CallRate, address_of


def test_some_at_once_then_some_a_second() -> None:
    rate = CallRate(at_once=3, per_second=2)
    assert [rate.admits("ada", 10.0) for _ in range(5)] == [True] * 3 + [False] * 2
    assert [rate.admits("ada", 10.5) for _ in range(2)] == [True, False]
    assert [rate.admits("ada", 1000.0) for _ in range(5)] == [True] * 3 + [False] * 2, "no more than at first"


def test_those_that_were_turned_away_do_not_count() -> None:
    rate = CallRate(at_once=1, per_second=1)
    assert rate.admits("ada", 0.0)
    assert not any(rate.admits("ada", 0.09 * call) for call in range(1, 11))
    assert rate.admits("ada", 1.0)


def test_one_address_does_not_use_up_what_another_has() -> None:
    rate = CallRate(at_once=1, per_second=0.1)
    assert rate.admits("ada", 0.0) and not rate.admits("ada", 0.0)
    assert rate.admits("bo", 0.0)


def test_many_addresses_take_no_more_memory_and_no_fresh_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_rate, "MOST_ADDRESSES", 2)
    rate = CallRate(at_once=1, per_second=0.001)
    assert [rate.admits(f"address {number}", 0.0) for number in range(6)] == [True, True] + [False] * 4


@pytest.mark.parametrize(
    ("peer", "address"),
    [("ipv4:10.0.0.7:41234", "ipv4:10.0.0.7"), ("ipv6:%5B::1%5D:41234", "ipv6:%5B::1%5D"), ("unix:", "unix")],
)
def test_an_address_has_no_port(peer: str, address: str) -> None:
    assert address_of(peer) == address
