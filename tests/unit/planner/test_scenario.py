"""Scenarios: which windows end with an exchange, and how unequal clients are."""

from __future__ import annotations

import math
import statistics

import pytest

from fedbert_ds.config import FederationSection, WireSection
from fedbert_ds.federation.strategy import strategy_of
from fedbert_ds.planner.scenario import BodyCosts, ClientCosts, Scenario, Spread, Wire

TYPICAL = ClientCosts(1e-5, 2e-5, 1e-3, rtt=0.05, up=1e6, down=2e6)


@pytest.mark.parametrize(
    ("federation", "expected"),
    [
        ({"mode": "synchronous"}, [True] * 4),
        ({"mode": "parallel", "average_every": 2}, [False, True, False, True]),
    ],
)
def test_windows_with_an_exchange_are_the_strategys(federation: dict, expected: list[bool]) -> None:
    strategy = strategy_of(FederationSection(**federation), WireSection())
    scenario = Scenario(BodyCosts(1e-4, 2e-4), (TYPICAL,), Wire(1.0, 2.0, 4.0, 8.0), strategy, 1024, 512)
    assert [scenario.exchanges(window) for window in range(4)] == expected
    assert (scenario.wire.up, scenario.wire.down) == (5.0, 10.0)


def test_without_spread_all_clients_are_typical() -> None:
    assert Spread().clients(TYPICAL, 3) == (TYPICAL,) * 3


def test_spread_is_log_normal_and_follows_from_the_seed() -> None:
    clients = Spread(speed=0.5, link=1.0, seed=3).clients(TYPICAL, 4000)
    assert clients == Spread(speed=0.5, link=1.0, seed=3).clients(TYPICAL, 4000)
    assert clients != Spread(speed=0.5, link=1.0, seed=4).clients(TYPICAL, 4000)
    slow = [math.log(client.embed_per_token / 1e-5) for client in clients]
    far = [math.log(client.rtt / 0.05) for client in clients]
    assert statistics.stdev(slow) == pytest.approx(0.5, rel=0.05) and abs(statistics.mean(slow)) < 0.05
    assert statistics.stdev(far) == pytest.approx(1.0, rel=0.05)
    for client in clients:
        assert client.rtt * client.up == pytest.approx(0.05 * 1e6), "a far client's link is slow, too"
        assert client.head_per_token / client.embed_per_token == pytest.approx(2.0)
