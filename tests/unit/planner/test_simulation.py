"""The planner's clock: what can be computed by hand comes out; every token is trained on once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbert_ds.config import FederationSection, WireSection
from fedbert_ds.federation.strategy import strategy_of
from fedbert_ds.planner.scenario import BodyCosts, ClientCosts, Scenario, Spread, Wire
from fedbert_ds.planner.simulation import simulate

BODY = BodyCosts(forward_per_token=1e-4, backward_per_token=2e-4)
NEAR = ClientCosts(embed_per_token=0.0, head_per_token=0.0)
LIGHT = Wire(1.0, 1.0, 1.0, 1.0)
EVERY_WINDOW = strategy_of(FederationSection(mode="synchronous"), WireSection())
NEVER = strategy_of(FederationSection(mode="parallel", average_every=1000), WireSection())
PLAIN = Scenario(BODY, (NEAR,) * 8, LIGHT, NEVER, tokens_per_window=16384, tokens_per_micro_batch=1024)


def test_with_nothing_to_wait_for_the_body_sets_the_pace():
    outcome = simulate(PLAIN)
    assert outcome.busy_share == pytest.approx(1.0)
    assert outcome.tokens_per_second == pytest.approx(1 / 3e-4)
    assert outcome.dummy_share == 0.0


def test_messages_and_steps_take_their_time():
    body = replace(BODY, per_micro_batch=0.01, step=0.5, gather=0.25)
    outcome = simulate(replace(PLAIN, body=body))
    seconds = 16384 * 3e-4 + 16 * 0.01 + 0.5 + 0.25
    assert outcome.tokens_per_second == pytest.approx(16384 / seconds)
    assert outcome.busy_share == pytest.approx((16384 * 3e-4 + 0.5) / seconds)


@pytest.mark.parametrize("rtt", [0.05, 0.2, 1.0])
def test_one_client_with_one_micro_batch_waits_for_everything(rtt: float):
    """Nothing overlaps: two round trips a window, the one for credit is hidden since credit is
    given ahead.
    """
    far = replace(NEAR, rtt=rtt)
    outcome = simulate(replace(PLAIN, clients=(far,), tokens_per_window=1024))
    # Hidden states and their gradient; input gradient and the next activations.
    assert outcome.tokens_per_second == pytest.approx(1024 / (1024 * 3e-4 + 2 * rtt), rel=1e-6)


def test_round_trips_are_hidden_when_halves_are_exchanged_rarely():
    """The next window's activations and a stock of backwards cover both round trips of a window's
    end.
    """
    far = replace(NEAR, rtt=0.2)
    assert simulate(replace(PLAIN, clients=(far,) * 8)).busy_share > 0.99


def test_an_exchange_after_every_window_costs_two_round_trips_and_staleness_hides_them():
    far = replace(NEAR, rtt=0.2)
    exact = replace(PLAIN, clients=(far,) * 8, strategy=EVERY_WINDOW)
    seconds = 16384 * 3e-4
    # Input gradients down, halves up and down, activations up.
    assert simulate(exact).busy_share == pytest.approx(seconds / (seconds + 2 * 0.2), rel=1e-3)
    assert simulate(replace(exact, staleness=1)).busy_share > 0.99


def test_a_link_carries_no_more_than_its_rate():
    narrow = replace(NEAR, up=1e4, down=1e9)
    outcome = simulate(replace(PLAIN, clients=(narrow,) * 8, wire=Wire(100.0, 1.0, 10.0, 1.0)))
    assert outcome.tokens_per_second == pytest.approx(8 * 1e4 / 110, rel=0.05)
    assert outcome.link_busy_share > 0.95


def test_the_servers_network_is_shared_by_all():
    outcome = simulate(replace(PLAIN, wire=Wire(100.0, 1.0, 10.0, 1.0), server_bytes_per_second=1e5))
    assert outcome.tokens_per_second == pytest.approx(1e5 / 110, rel=0.03)


def test_clients_on_few_cores_work_one_after_another():
    slow = replace(NEAR, embed_per_token=1e-3)
    apart = simulate(replace(PLAIN, clients=(slow,) * 8))
    together = simulate(replace(PLAIN, clients=(slow,) * 8, client_cores=1))
    assert together.tokens_per_second == pytest.approx(1 / 2e-3, rel=0.03)  # forward and backward
    assert apart.tokens_per_second > 3 * together.tokens_per_second


def test_slow_clients_gain_from_sharing_micro_batches():
    slow = replace(NEAR, head_per_token=2e-3)
    alone = replace(PLAIN, clients=(slow,) * 16, affordable_in_flight=4)
    assert (
        simulate(replace(alone, clients_per_micro_batch=8)).tokens_per_second > 1.5 * simulate(alone).tokens_per_second
    )


@settings(max_examples=40)
@given(
    ranks=st.integers(1, 3),
    clients=st.integers(1, 9),
    mode=st.sampled_from(["parallel", "synchronous", "sequential"]),
    participants=st.none() | st.integers(1, 9),
    staleness=st.integers(0, 2),
    average_every=st.integers(1, 3),
    tokens=st.integers(1, 6000),
    together=st.integers(1, 4),
    spread=st.floats(0.0, 1.0),
)
def test_any_federation_trains_on_every_token_once(
    ranks, clients, mode, participants, staleness, average_every, tokens, together, spread
):
    chosen = {"participants": participants} if participants and mode != "sequential" else {}
    typical = ClientCosts(1e-5, 2e-5, 1e-3, rtt=0.05, up=1e6, down=1e6)
    scenario = replace(
        PLAIN,
        clients=Spread(spread, spread).clients(typical, clients),
        tokens_per_window=tokens,
        num_ranks=ranks,
        strategy=strategy_of(FederationSection(mode=mode, average_every=average_every, **chosen), WireSection()),
        staleness=staleness if mode == "synchronous" or (not chosen and mode == "parallel") else 0,
        clients_per_micro_batch=together,
        wire=Wire(1.0, 1.0, 1.0, 1.0, update=1e4),
        body=replace(BODY, per_micro_batch=1e-3, step=0.01, gather=0.001),
    )
    outcome = simulate(scenario, windows=5, settling=1)
    count = 1 if mode == "sequential" else min(clients, participants or clients)
    assert [window.tokens for window in outcome.windows] == [count * max(1, tokens // count)] * 4
    assert 0.0 < outcome.busy_share <= 1.0 + 1e-9
    assert outcome.client_busy_share <= 1.0 + 1e-9 and outcome.link_busy_share <= 1.0 + 1e-9


def test_the_queues_own_cost_grows_with_micro_batches_alone():
    """Counted, not timed: events of a window are a fixed number for each client and micro-batch."""
    counts = {}
    for clients in (10, 1000):
        grown = replace(PLAIN, clients=(NEAR,) * clients, tokens_per_window=1024 * clients)
        counts[clients] = simulate(grown, windows=3, settling=1).events / clients
    assert counts[1000] == pytest.approx(counts[10], rel=0.1)


def test_a_window_waits_for_its_participants_alone():
    """Two of eight clients a round, one of them slow: only its rounds are slow."""
    slow = replace(NEAR, rtt=1.0)
    some = strategy_of(FederationSection(mode="parallel", average_every=2, participants=2), WireSection())
    scenario = replace(PLAIN, clients=(slow,) + (NEAR,) * 7, strategy=some)
    outcome = simulate(scenario, windows=40, settling=0)
    sampler = some.sampler(0, {f"client-{number:05d}": 0 for number in range(8)})
    has_slow = [sampler.takes_part("client-00000", window) for window in range(40)]
    assert any(has_slow) and not all(has_slow)
    near = simulate(replace(scenario, clients=(NEAR,) * 8), windows=40, settling=0)
    late = []
    for window, (mine, other) in enumerate(zip(outcome.windows, near.windows, strict=True)):
        assert mine.tokens == 16384
        late.append(mine.seconds - other.seconds)
        # The average of the round before ends in the first window of a round.
        if not has_slow[window] and not has_slow[max(0, window - 1)]:
            assert late[-1] == pytest.approx(0.0, abs=1e-6)
    slow_rounds = sum(has_slow) // 2
    assert sum(late) > 2 * 0.5 * slow_rounds
