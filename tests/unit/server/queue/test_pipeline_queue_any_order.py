"""The pipeline queue in any order of arrivals: what holds whoever joins, leaves, is late or falls
silent, and when.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.server.queue.federation import Choose, Federation, queue_state
from unit.server.queue.oracle import Lengths, Oracle

from fedbert_ds.errors import WireError
from fedbert_ds.federation.sampler import Sample
from fedbert_ds.server.queue.decisions import Forward, Step
from fedbert_ds.wire.messages import Manifest

CAPACITY = 12
NAMES = ("ada", "bo", "cy", "di", "ed", "flo")

# Drawn as one choice each: drawing manifests was half of these tests' time.
SEQUENCE = st.sampled_from([(tokens, masked) for tokens in range(1, CAPACITY + 1) for masked in range(tokens + 1)])
SEQUENCES = st.lists(SEQUENCE, min_size=1, max_size=6)


def drawn_lengths(data: st.DataObject) -> Lengths:
    """Manifests as Hypothesis likes them, each drawn once."""
    drawn: dict[tuple[str, int], tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def lengths(client: str, window: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if (client, window) not in drawn:
            sequences = data.draw(SEQUENCES, label=f"{client}, window {window}")
            drawn[client, window] = tuple(zip(*sequences, strict=True))
        return drawn[client, window]

    return lengths


@functools.cache
def below(count: int) -> st.SearchStrategy[int]:
    """Made once each: a choice is drawn for every event, and making its strategy took as long as
    drawing it.
    """
    return st.integers(0, count - 1)


def chooser(data: st.DataObject) -> Choose:
    """Nothing is drawn where there is no choice."""
    return lambda options: options[data.draw(below(len(options))) if len(options) > 1 else 0]


def drawn_participation(data: st.DataObject, most: int = len(NAMES)) -> Any:
    """At most so many of all names in a round; often all of them."""
    round_windows, count, seed = data.draw(
        st.tuples(st.integers(1, 2), st.integers(1, most), st.integers(0, 99)), label="round, participants, seed"
    )
    return Sample(dict.fromkeys(NAMES, 0), round_windows, count, seed).takes_part


def drawn_federation(data: st.DataObject, lengths: Lengths, **fixed: Any) -> Federation:
    windows_ahead = data.draw(st.integers(1, 3), label="windows ahead")
    drawn: dict[str, Any] = {
        "num_ranks": data.draw(st.integers(1, 4), label="ranks"),
        "in_flight": data.draw(st.integers(1, 4), label="micro-batches in flight"),
        "order": data.draw(st.sampled_from(["arrival", "fixed"]), label="order"),
        "lockstep_forwards": data.draw(st.booleans(), label="lockstep forwards"),
        "windows_ahead": windows_ahead,
        "staleness": data.draw(st.integers(0, windows_ahead), label="staleness"),
        "is_synchronous": data.draw(st.booleans(), label="synchronous"),
    }
    return Federation(**(drawn | fixed), lengths=lengths, capacity=CAPACITY)


ANY_ORDER = settings(max_examples=100, suppress_health_check=list(HealthCheck))


@ANY_ORDER
@given(data=st.data())
def test_any_arrivals_losses_and_clocks(data: st.DataObject) -> None:
    """Whoever joins, leaves, is late or falls silent, whenever windows are undone or held up: the
    oracle compares each decision with its books.
    """
    choose = chooser(data)
    timeout = 10.0
    windows = data.draw(st.integers(1, 4), label="windows")
    order = data.draw(st.sampled_from(["arrival", "fixed"]))
    federation = drawn_federation(
        data,
        drawn_lengths(data),
        silence_timeout=timeout,
        order=order,
        deadline=choose([3.0, math.inf]) if order == "arrival" else math.inf,
        takes_part=drawn_participation(data),
        num_windows=choose([windows, math.inf]),
    )
    num_ranks = len(federation.ranks)
    for name in NAMES[: data.draw(st.integers(0, 6), label="clients")]:
        federation.join(choose(range(num_ranks)), name, mute=choose([None, None, None, "activations", "gradient"]))
    for _ in range(data.draw(st.integers(0, 150), label="random events")):
        if federation.finished == windows:
            break
        deciding: list[Any] = [
            ("decide", number) for number, rank in enumerate(federation.ranks) if not rank.is_blocked
        ]
        usual = ["arrive", "decide"] * 4
        what = choose([*usual, "clock", "lose", "join", "roll back", "hold"])
        connected = [(number, name) for number, rank in enumerate(federation.ranks) for name in rank.oracle.clients]
        if what == "arrive" and (arrivals := federation.possible()):
            federation.do(choose(arrivals))
        elif what == "decide" and deciding:
            federation.do(choose(deciding))
        elif what == "clock":
            federation.now += choose([0.1, 1.0, 3.5, timeout + 0.5])
        elif what == "lose" and connected:
            federation.lose(*choose(connected))
        elif what == "join" and (absent := sorted(set(NAMES) - {name for _, name in connected})):
            federation.join(choose(range(num_ranks)), choose(absent), is_awaited=choose([True, False]))
        elif what == "roll back":
            federation.roll_back(choose(range(federation.finished + 1)))
        elif what == "hold":
            federation.hold(choose([True, False]))
    federation.hold(False)
    federation.run(windows, choose)
    collectives = [rank.collectives for rank in federation.ranks]
    # A rank may already have told that its next window is planned.
    shortest = min(map(len, collectives))
    assert all(issued[:shortest] == collectives[0][:shortest] for issued in collectives)


def fall_behind(
    federation: Federation, data: st.DataObject, choose: Choose, most_events: int, more_windows: int
) -> None:
    """Clients are late again and again, in any order of events; then everybody gets a turn."""
    for _ in range(data.draw(st.integers(10, most_events), label="random events")):
        federation.decide_all()
        if choose([False, False, False, True]):
            federation.now += 3.5
        elif arrivals := federation.possible():
            federation.do(choose(arrivals))
    # Who never answers is not waited for.
    turns = itertools.count()
    federation.run(federation.finished + more_windows, lambda options: options[next(turns) % len(options)])
    assert not federation.expired


@ANY_ORDER
@given(data=st.data())
def test_late_clients_are_suspended_and_come_back(data: st.DataObject) -> None:
    """Clients that fall behind again and again stop nobody, and whoever is there at the end takes
    part again.
    """
    choose = chooser(data)
    federation = drawn_federation(data, drawn_lengths(data), order="arrival", deadline=3.0)
    num_ranks = len(federation.ranks)
    names = NAMES[: data.draw(st.integers(1, 5), label="clients")]
    for name in names:
        federation.join(choose(range(num_ranks)), name)
    fall_behind(federation, data, choose, most_events=80, more_windows=10)
    for rank in federation.ranks:
        assert rank.queue.active == rank.oracle.clients.keys(), "who answers is waited for again"
        assert rank.oracle.lost_masked_tokens[-1] == 0
        assert rank.oracle.last_members == rank.oracle.clients.keys()


@ANY_ORDER
@given(data=st.data())
def test_late_clients_come_back_where_few_take_part(data: st.DataObject) -> None:
    """Nobody expires who is not asked for anything, and whoever is there at the end trains in its
    own windows.
    """
    choose = chooser(data)
    takes_part = drawn_participation(data, most=3)
    federation = drawn_federation(
        data, drawn_lengths(data), order="arrival", deadline=3.0, silence_timeout=1000.0, takes_part=takes_part
    )
    num_ranks = len(federation.ranks)
    for name in NAMES:
        federation.join(choose(range(num_ranks)), name)
    fall_behind(federation, data, choose, most_events=60, more_windows=20)
    for rank in federation.ranks:
        assert rank.queue.active == rank.oracle.clients.keys()
        assert rank.oracle.lost_masked_tokens[-1] == 0
        last = rank.oracle.next_window - 1
        assert rank.oracle.last_members == {name for name in rank.oracle.clients if takes_part(name, last)}


@settings(ANY_ORDER, max_examples=25)
@given(data=st.data())
def test_what_is_against_the_protocol_is_refused_at_any_time(data: st.DataObject) -> None:
    """Every call that is out of place is a WireError and changes nothing, and the window ends as if
    it had not been.
    """
    choose = chooser(data)
    federation = drawn_federation(
        data, drawn_lengths(data), num_ranks=data.draw(st.integers(1, 2)), takes_part=drawn_participation(data)
    )
    for number, name in enumerate(NAMES[: data.draw(st.integers(1, 4))]):
        federation.join(number % len(federation.ranks), name)

    def choose_after_violations(options: Sequence[Any]) -> Any:
        violate_all(federation)
        return choose(options)

    federation.run(2, choose_after_violations)
    assert [sum(rank.oracle.lost_masked_tokens) for rank in federation.ranks] == [0] * len(federation.ranks)


def violate_all(federation: Federation) -> None:
    """Each call against the protocol is a WireError, and the queues are as they were."""
    before = [queue_state(rank.queue) for rank in federation.ranks]
    for rank in federation.ranks:
        for method, arguments in violations(rank.oracle, federation.now):
            with pytest.raises(WireError):
                getattr(rank.queue, method)(*arguments)
    assert [queue_state(rank.queue) for rank in federation.ranks] == before, "a call was refused, but changed a queue"


def violations(oracle: Oracle, now: float) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Calls that are against the protocol just now: method of the queue, arguments."""
    indices = [*(entry.plan.index for _, entry in oracle.micro_batches), 10**6]
    for client in oracle.clients.values():
        yield "join", (client.name, now)
        expected = oracle.wanted_manifest(client.name)
        assert expected is not None
        others = {expected - 1, expected + 1, oracle.next_window - 1, oracle.next_window, 10**6} - {expected, -1}
        wrong = sorted(others)
        if client.announced is not None:
            wrong.append(expected)
        if client.is_left_out:
            wrong = [window for window in wrong if window >= oracle.next_window]
        yield from (("manifest", (Manifest(client.name, window, (1,), (0,)),)) for window in wrong)
        for kind in ("activations", "gradient"):
            yield from (("answer", (client.name, index, kind)) for index in indices if (kind, index) not in client.owed)
    yield "manifest", (Manifest("nobody", oracle.next_window, (1,), (0,)),)
    for index in indices:
        yield "answer", ("nobody", index, "activations")
        yield "answer", ("nobody", index, "gradient")


@ANY_ORDER
@given(data=st.data())
def test_without_losses_nothing_is_lost(data: st.DataObject) -> None:
    lengths = drawn_lengths(data)
    federation = drawn_federation(data, lengths, takes_part=drawn_participation(data))
    for name in NAMES[: data.draw(st.integers(0, 6))]:
        federation.join(len(name) % len(federation.ranks), name)
    federation.run(3, chooser(data))
    assert [sum(rank.oracle.lost_masked_tokens) for rank in federation.ranks] == [0] * len(federation.ranks)
    assert not federation.expired


@ANY_ORDER
@given(data=st.data())
def test_fixed_order_follows_the_manifests_alone(data: st.DataObject) -> None:
    """Two runs with the same manifests and other arrivals compute the same things in the same
    order.
    """
    lengths = drawn_lengths(data)
    options = {
        "num_ranks": data.draw(st.integers(1, 3)),
        "in_flight": data.draw(st.integers(1, 3)),
        "lockstep_forwards": data.draw(st.booleans()),
        "takes_part": drawn_participation(data),
    }
    computed = []
    for choose in (lambda options: options[0], chooser(data)):
        federation = drawn_federation(data, lengths, order="fixed", **options)
        for number, name in enumerate(NAMES[:4]):
            federation.join(number % options["num_ranks"], name)
        federation.run(3, choose)
        computed.append([_without_numbers(rank.oracle.computed) for rank in federation.ranks])
    assert computed[0] == computed[1]


@ANY_ORDER
@given(data=st.data())
def test_windows_that_were_undone_are_trained_as_if_for_the_first_time(data: st.DataObject) -> None:
    """After any events whatever, windows planned ahead among them: the schedule from there on is
    that of queues that nothing ever happened to, if the same clients are there.
    """
    choose = chooser(data)
    lengths = drawn_lengths(data)
    options = {
        "num_ranks": data.draw(st.integers(1, 3)),
        "in_flight": data.draw(st.integers(1, 3)),
        "lockstep_forwards": data.draw(st.booleans()),
        "num_windows": 4,
    }
    places = {name: number % options["num_ranks"] for number, name in enumerate(NAMES[:4])}
    undisturbed = drawn_federation(data, lengths, order="fixed", **options)
    disturbed = drawn_federation(data, lengths, order="fixed", **options)
    for federation in (undisturbed, disturbed):
        for name, rank in places.items():
            federation.join(rank, name)
    undisturbed.run(4)
    gone: set[str] = set()
    for _ in range(data.draw(st.integers(1, 120), label="random events")):
        deciding: list[Any] = [("decide", n) for n, rank in enumerate(disturbed.ranks) if not rank.is_blocked]
        what = choose(["arrive", "decide", "arrive", "decide", "arrive", "decide", "lose", "return"])
        if what == "arrive" and (arrivals := disturbed.possible()):
            disturbed.do(choose(arrivals))
        elif what == "decide" and deciding:
            disturbed.do(choose(deciding))
        elif what == "lose" and (here := sorted(places.keys() - gone)):
            gone.add(name := choose(here))
            disturbed.lose(places[name], name)
        elif what == "return" and gone:
            gone.remove(name := choose(sorted(gone)))
            disturbed.join(places[name], name, is_awaited=choose([True, False]))
    window = choose(range(disturbed.finished + 1))
    disturbed.hold(True)
    is_told_first = choose([True, False])
    if is_told_first:
        disturbed.roll_back(window)
    for name in sorted(gone):
        disturbed.join(places[name], name)
    if not is_told_first:
        disturbed.roll_back(window)
    disturbed.hold(False)
    disturbed.run(4, choose)
    for one, other in zip(undisturbed.ranks, disturbed.ranks, strict=True):
        assert _without_numbers(other.oracle.computed[window:]) == _without_numbers(one.oracle.computed[window:])
        assert not any(other.oracle.lost_masked_tokens[window:])


def _without_numbers(windows: list[list[Any]]) -> list[list[Any]]:
    """Micro-batches by their place in the window: with more windows planned ahead, dummies have
    other numbers.
    """
    placed = []
    for decisions in windows:
        numbers = sorted(made.micro_batch for made in decisions if isinstance(made, Forward))
        places = {number: place for place, number in enumerate(numbers)}
        placed.append(
            [made if isinstance(made, Step) else replace(made, micro_batch=places[made.micro_batch])
             for made in decisions]
        )  # fmt: skip
    return placed


@pytest.mark.parametrize("order", ["arrival", "fixed"])
@pytest.mark.parametrize("lockstep_forwards", [False, True])
def test_a_client_that_never_answers_expires_and_the_window_ends(order, lockstep_forwards: bool) -> None:
    federation = Federation(
        num_ranks=2, in_flight=2, order=order, lockstep_forwards=lockstep_forwards, silence_timeout=30.0,
        lengths=lambda client, window: ((5, 5, 5), (1, 2, 1)), capacity=10,
    )  # fmt: skip
    for number, name in enumerate(NAMES[:4]):
        federation.join(number % 2, name, mute="activations" if name == "bo" else None)
    federation.run(3)
    assert federation.expired == ["bo"]
    assert federation.ranks[1].oracle.lost_masked_tokens == [4, 0, 0]
    assert federation.ranks[0].oracle.lost_masked_tokens == [0, 0, 0]


@pytest.mark.parametrize("mute", ["activations", "gradient"])
@ANY_ORDER
@given(data=st.data())
def test_arrival_order_does_not_wait_for_a_slow_client(mute: str, data: st.DataObject) -> None:
    """All that a silent client has no part in is backwarded before it expires, however much text it
    announced.
    """
    # With one graph at a time, somebody who does not give its gradient stops all others.
    in_flight = data.draw(st.integers(1 if mute == "activations" else 2, 4), label="micro-batches in flight")
    lengths = drawn_lengths(data)
    if mute == "gradient":
        # With nobody sharing its micro-batches: who shares some may be taken for the slow one for a
        # while.
        counts = data.draw(st.lists(st.integers(1, 6), min_size=len(NAMES), max_size=len(NAMES)), label="sequences")
        counted = dict(zip(NAMES, counts, strict=True))
        lengths = lambda client, window: ((CAPACITY,) * counted[client], (1,) * counted[client])  # noqa: E731
    federation = drawn_federation(
        data, lengths, num_ranks=1, in_flight=in_flight, order="arrival", lockstep_forwards=False
    )
    names = NAMES[: data.draw(st.integers(2, 5), label="clients")]
    silent = data.draw(st.sampled_from(names), label="silent")
    for name in names:
        federation.join(0, name, mute=mute if name == silent else None)
    choose = chooser(data)
    while True:
        if federation.decide_all():
            continue
        if not (actions := federation.possible()):
            break
        federation.do(choose(actions))
    window = federation.ranks[0].oracle.windows[0]
    left = [entry.plan for entry in window.micro_batches.values() if entry.backwarded is None]
    assert all(silent in {piece.client for piece in micro_batch.pieces} for micro_batch in left)
    assert left and federation.finished == 0
