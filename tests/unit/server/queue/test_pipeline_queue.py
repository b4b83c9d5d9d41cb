"""The pipeline queue: what holds in any order of arrivals, what is refused, and exact orders of small windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.server.queue.simulation import Federation, FixedAnswerTimes, Lengths

from fedbert_ds.errors import WireError
from fedbert_ds.server.queue.deadlines import Deadlines
from fedbert_ds.server.queue.decisions import Backward, Expire, Forward, Open, Plan, Step, Suspend
from fedbert_ds.server.queue.in_flight import InFlightLimits
from fedbert_ds.server.queue.packing import Piece
from fedbert_ds.server.queue.pipeline_queue import PipelineQueue
from fedbert_ds.wire.messages import Manifest

CAPACITY = 12
NAMES = ("ada", "bo", "cy", "di", "ed", "flo")

SEQUENCES = st.lists(
    st.integers(1, CAPACITY).flatmap(lambda length: st.tuples(st.just(length), st.integers(0, length))),
    min_size=1,
    max_size=6,
)


def drawn_lengths(data: st.DataObject) -> Lengths:
    """Manifests as Hypothesis likes them, each drawn once."""
    drawn: dict[tuple[str, int], tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def lengths(client: str, window: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if (client, window) not in drawn:
            sequences = data.draw(SEQUENCES, label=f"{client}, window {window}")
            drawn[client, window] = tuple(zip(*sequences, strict=True))
        return drawn[client, window]

    return lengths


def chooser(data: st.DataObject) -> Callable[[Sequence[Any]], Any]:
    return lambda options: options[data.draw(st.integers(0, len(options) - 1))]


def drawn_federation(data: st.DataObject, lengths: Lengths, **fixed: Any) -> Federation:
    windows_ahead = data.draw(st.integers(1, 3), label="windows ahead")
    drawn: dict[str, Any] = {
        "num_ranks": data.draw(st.integers(1, 4), label="ranks"),
        "depth": data.draw(st.integers(1, 4), label="micro-batches in flight"),
        "order": data.draw(st.sampled_from(["arrival", "fixed"]), label="order"),
        "lockstep_forwards": data.draw(st.booleans(), label="lockstep forwards"),
        "windows_ahead": windows_ahead,
        "staleness": data.draw(st.integers(0, windows_ahead), label="staleness"),
        "is_synchronous": data.draw(st.booleans(), label="synchronous"),
    }
    return Federation(**(drawn | fixed), lengths=lengths, capacity=CAPACITY)


ANY_ORDER = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@ANY_ORDER
@given(data=st.data())
def test_any_arrivals_losses_and_clocks(data: st.DataObject) -> None:
    """Whoever joins, leaves, is late or falls silent, and when: `simulation` compares each decision with its books."""
    choose = chooser(data)
    timeout = 10.0
    windows = data.draw(st.integers(1, 4), label="windows")
    order = data.draw(st.sampled_from(["arrival", "fixed"]))
    federation = drawn_federation(
        data,
        drawn_lengths(data),
        timeout=timeout,
        order=order,
        deadlines=choose([3.0, math.inf]) if order == "arrival" else math.inf,
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
        what = choose(["arrive", "decide", "arrive", "decide", "arrive", "decide", "clock", "lose", "join"])
        connected = [(number, name) for number, rank in enumerate(federation.ranks) for name in rank.clients]
        if what == "arrive" and (arrivals := federation.possible()):
            federation.do(choose(arrivals))
        elif what == "decide" and deciding:
            federation.do(choose(deciding))
        elif what == "clock":
            federation.now += choose([0.1, 1.0, 3.5, timeout + 0.5])
        elif what == "lose" and connected:
            federation.lose(*choose(connected))
        elif what == "join" and (absent := sorted(set(NAMES) - {name for _, name in connected})):
            federation.join(choose(range(num_ranks)), choose(absent))
    federation.run(windows, choose)
    collectives = [rank.collectives for rank in federation.ranks]
    # A rank may already have told that its next window is planned.
    shortest = min(map(len, collectives))
    assert all(issued[:shortest] == collectives[0][:shortest] for issued in collectives)


@ANY_ORDER
@given(data=st.data())
def test_late_clients_are_passed_over_and_come_back(data: st.DataObject) -> None:
    """Clients that fall behind again and again stop nobody, and whoever is there at the end takes part again."""
    choose = chooser(data)
    federation = drawn_federation(data, drawn_lengths(data), order="arrival", deadlines=3.0)
    num_ranks = len(federation.ranks)
    names = NAMES[: data.draw(st.integers(1, 5), label="clients")]
    for name in names:
        federation.join(choose(range(num_ranks)), name)
    for _ in range(data.draw(st.integers(10, 80), label="random events")):
        federation.decide_all()
        if choose([False, False, False, True]):
            federation.now += 3.5
        elif arrivals := federation.possible():
            federation.do(choose(arrivals))
    # Everybody gets a turn: who never answers is not waited for.
    turns = itertools.count()
    federation.run(federation.finished + 10, lambda options: options[next(turns) % len(options)])
    assert not federation.expired
    for rank in federation.ranks:
        assert rank.queue.active == rank.clients.keys(), "who answers is waited for again"
        assert rank.lost_masked_tokens[-1] == 0
        assert rank.last_members == rank.clients.keys()


@settings(ANY_ORDER, max_examples=25)
@given(data=st.data())
def test_what_is_against_the_protocol_is_refused_at_any_time(data: st.DataObject) -> None:
    """Every call that is out of place is a WireError and changes nothing, and the window ends as if it had not been."""
    choose = chooser(data)
    federation = drawn_federation(data, drawn_lengths(data), num_ranks=data.draw(st.integers(1, 2)))
    for number, name in enumerate(NAMES[: data.draw(st.integers(1, 4))]):
        federation.join(number % len(federation.ranks), name)

    def choose_after_violations(options: Sequence[Any]) -> Any:
        federation.violate_all()
        return choose(options)

    federation.run(2, choose_after_violations)
    assert [sum(rank.lost_masked_tokens) for rank in federation.ranks] == [0] * len(federation.ranks)


@ANY_ORDER
@given(data=st.data())
def test_without_losses_nothing_is_lost(data: st.DataObject) -> None:
    lengths = drawn_lengths(data)
    federation = drawn_federation(data, lengths)
    for name in NAMES[: data.draw(st.integers(0, 6))]:
        federation.join(len(name) % len(federation.ranks), name)
    federation.run(3, chooser(data))
    assert [sum(rank.lost_masked_tokens) for rank in federation.ranks] == [0] * len(federation.ranks)
    assert not federation.expired


@ANY_ORDER
@given(data=st.data())
def test_fixed_order_follows_the_manifests_alone(data: st.DataObject) -> None:
    """Two runs with the same manifests and other arrivals compute the same things in the same order."""
    lengths = drawn_lengths(data)
    options = {
        "num_ranks": data.draw(st.integers(1, 3)),
        "depth": data.draw(st.integers(1, 3)),
        "lockstep_forwards": data.draw(st.booleans()),
    }
    computed = []
    for choose in (lambda options: options[0], chooser(data)):
        federation = drawn_federation(data, lengths, order="fixed", **options)
        for number, name in enumerate(NAMES[:4]):
            federation.join(number % options["num_ranks"], name)
        federation.run(3, choose)
        computed.append([_without_numbers(rank.computed) for rank in federation.ranks])
    assert computed[0] == computed[1]


def _without_numbers(windows: list[list[Any]]) -> list[list[Any]]:
    """Micro-batches by their place in the window: with more windows planned ahead, dummies have other numbers."""
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
        num_ranks=2, depth=2, order=order, lockstep_forwards=lockstep_forwards, timeout=30.0,
        lengths=lambda client, window: ((5, 5, 5), (1, 2, 1)), capacity=10,
    )  # fmt: skip
    for number, name in enumerate(NAMES[:4]):
        federation.join(number % 2, name, mute="activations" if name == "bo" else None)
    federation.run(3)
    assert federation.expired == ["bo"]
    assert federation.ranks[1].lost_masked_tokens == [4, 0, 0]
    assert federation.ranks[0].lost_masked_tokens == [0, 0, 0]


@pytest.mark.parametrize("mute", ["activations", "gradient"])
@ANY_ORDER
@given(data=st.data())
def test_arrival_order_does_not_wait_for_a_slow_client(mute: str, data: st.DataObject) -> None:
    """All that a silent client has no part in is backwarded before it expires, however much text it announced."""
    # With one graph at a time, somebody who does not give its gradient stops all others.
    depth = data.draw(st.integers(1 if mute == "activations" else 2, 4), label="micro-batches in flight")
    lengths = drawn_lengths(data)
    if mute == "gradient":
        # With nobody sharing its micro-batches: who shares some may be taken for the slow one for a while.
        counts = data.draw(st.lists(st.integers(1, 6), min_size=len(NAMES), max_size=len(NAMES)), label="sequences")
        counted = dict(zip(NAMES, counts, strict=True))
        lengths = lambda client, window: ((CAPACITY,) * counted[client], (1,) * counted[client])  # noqa: E731
    federation = drawn_federation(data, lengths, num_ranks=1, depth=depth, order="arrival", lockstep_forwards=False)
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
    rank = federation.ranks[0]
    left = [entry.plan for entry in rank.windows[0].micro_batches.values() if entry.backwarded is None]
    assert all(silent in {piece.client for piece in micro_batch.pieces} for micro_batch in left)
    assert left and federation.finished == 0


# -- exact orders ---------------------------------------------------------------------------------------------------


def pieces(*clients: str) -> tuple[Piece, ...]:
    return tuple(Piece(client, 0, 1, tokens=4, masked=2) for client in clients)


def queue_of(depth: int, plans: Sequence[Sequence[tuple[Piece, ...]]], **options: Any) -> PipelineQueue:
    """A queue that packs windows like this, whatever is in the manifests of those who are there."""
    remaining = iter(plans)

    def pack(manifests: Sequence[Manifest]) -> list[tuple[Piece, ...]]:
        here = {manifest.client for manifest in manifests}
        kept = [tuple(piece for piece in micro_batch if piece.client in here) for micro_batch in next(remaining)]
        return [micro_batch for micro_batch in kept if micro_batch]

    return PipelineQueue(depth, pack, **{"num_windows": len(plans), **options})


def announce(queue: PipelineQueue, *clients: str) -> None:
    for client in clients:
        queue.manifest(Manifest(client, queue.next_window, (4,), (2,)))


def started(
    depth: int,
    plan: Sequence[tuple[Piece, ...]],
    order: Literal["arrival", "fixed"] = "arrival",
    **options: Any,
) -> PipelineQueue:
    """A queue in window 0 of this plan, the only one."""
    real = [micro_batch for micro_batch in plan if micro_batch]
    queue = queue_of(depth, [real], order=order, **options)
    clients = sorted({piece.client for micro_batch in real for piece in micro_batch})
    for client in clients:
        queue.join(client, 0.0)
    announce(queue, *clients)
    assert isinstance(queue.decide(0.0), Plan)
    queue.start(len(plan), 0.0)
    return queue


def decided(queue: PipelineQueue, now: float = 0.0) -> list[str]:
    """Decisions until the queue waits, in short: `open 0`, `forward 0 ada+bo`, `backward 0 ada last`."""
    words = []
    while (decision := queue.decide(now)) is not None:
        match decision:
            case Plan(window, _, manifests, suspended):
                who = "+".join(sorted(manifest.client for manifest in manifests))
                over = f"without {'+'.join(sorted(suspended))}" if suspended else ""
                words.append(" ".join(filter(None, [f"plan {window}", who, over])))
            case Open(_, index, _):
                words.append(f"open {index}")
            case Forward(index, done):
                words.append(f"forward {index} {'+'.join(piece.client for piece in done)}".rstrip())
            case Backward(index, done, is_last):
                clients = "+".join(piece.client for piece in done)
                words.append(" ".join(filter(None, [f"backward {index}", clients, "last" if is_last else ""])))
            case Suspend(client, skipped):
                words.append(f"suspend {client} {skipped}")
            case Expire(client):
                words.append(f"expire {client}")
            case Step(window, lost):
                words.append(f"step {window} lost {lost}")
    return words


def trained(queue: PipelineQueue, client: str, index: int, now: float = 0.0) -> list[str]:
    """A client's micro-batch from activations to backward."""
    queue.activations(client, index)
    words = decided(queue, now)
    queue.gradient(client, index)
    return words + decided(queue, now)


def test_order_of_arrival() -> None:
    queue = started(1, [pieces("ada"), pieces("ada", "bo"), pieces("bo"), pieces("bo")])
    assert decided(queue) == [
        "open 0",
        "open 2",  # not 1: ada has its part of the credit already; and no more than twice the depth
    ]
    queue.activations("bo", 2)
    queue.activations("ada", 0)
    assert decided(queue) == [
        "forward 2 bo",  # complete before 0 was; then the depth is reached
    ]
    queue.gradient("bo", 2)
    assert decided(queue) == [
        "backward 2 bo",  # its graph makes room
        "open 1",  # credit as soon as a place is free; neither owes anything, so the plan decides
        "forward 0 ada",  # complete since long
    ]
    queue.activations("ada", 1)
    queue.gradient("ada", 0)
    assert decided(queue) == ["backward 0 ada", "open 3"]  # 1 still waits for bo, who has all credit that is left
    queue.activations("bo", 1)
    assert decided(queue) == ["forward 1 ada+bo"]
    queue.activations("bo", 3)
    queue.gradient("bo", 1)
    assert decided(queue) == []
    queue.gradient("ada", 1)
    assert decided(queue) == ["backward 1 ada+bo", "forward 3 bo"]
    queue.gradient("bo", 3)
    assert decided(queue) == [
        "backward 3 bo last",  # the gradient-accumulation boundary
        "step 0 lost 0",
    ]


def test_credit_goes_in_the_order_of_the_plan_but_to_nobody_more_than_a_fair_part() -> None:
    queue = started(2, [pieces("ada")] * 4 + [pieces("bo")] * 2 + [pieces("cy"), ()])
    assert decided(queue)[:4] == [
        "open 0",
        "open 1",  # two of four: a third of the credit, rounded up
        "open 4",
        "open 5",
    ]


def test_forwards_go_before_backwards_while_there_is_room() -> None:
    queue = started(2, [pieces("ada"), pieces("bo"), pieces("cy")])
    assert decided(queue) == ["open 0", "open 1", "open 2"]
    queue.activations("ada", 0)
    assert decided(queue) == ["forward 0 ada"]
    queue.gradient("ada", 0)
    queue.activations("bo", 1)
    assert decided(queue) == ["forward 1 bo", "backward 0 ada"]  # the gradient was first, but there is room
    queue.gradient("bo", 1)
    queue.activations("cy", 2)
    assert decided(queue) == ["forward 2 cy", "backward 1 bo"]
    queue.gradient("cy", 2)
    assert decided(queue) == ["backward 2 cy last", "step 0 lost 0"]


def test_older_answers_go_first_and_dummies_last() -> None:
    queue = started(3, [pieces("ada"), pieces("bo"), pieces("cy"), ()])
    assert decided(queue) == [
        "open 0",
        "open 1",
        "open 2",
        "open 3",  # a dummy waits for nobody
        "forward 3",  # nothing real is ready
        "backward 3",
    ]
    for client, index in (("cy", 2), ("ada", 0), ("bo", 1)):
        queue.activations(client, index)
    assert decided(queue) == ["forward 2 cy", "forward 0 ada", "forward 1 bo"]  # as they became complete
    queue.gradient("bo", 1)
    queue.gradient("cy", 2)
    queue.gradient("ada", 0)
    assert decided(queue) == ["backward 1 bo", "backward 2 cy", "backward 0 ada last", "step 0 lost 0"]


def test_a_dummy_lets_real_work_go_first() -> None:
    queue = started(3, [pieces("ada"), pieces("ada"), ()])
    assert [queue.decide(0.0) for _ in range(3)] == [
        Open(0, 0, pieces("ada")),
        Open(0, 1, pieces("ada")),
        Open(0, 2, ()),
    ]
    queue.activations("ada", 0)
    assert queue.decide(0.0) == Forward(0, pieces("ada"))  # the dummy was ready before it
    assert queue.decide(0.0) == Forward(2, ())
    queue.activations("ada", 1)
    assert queue.decide(0.0) == Forward(1, pieces("ada"))  # the dummy's gradient was there before, and is a backward
    queue.gradient("ada", 0)
    assert queue.decide(0.0) == Backward(0, pieces("ada"), is_last=False)
    assert queue.decide(0.0) == Backward(2, (), is_last=False)
    queue.gradient("ada", 1)
    assert queue.decide(0.0) == Backward(1, pieces("ada"), is_last=True)


def test_the_last_place_in_flight_is_not_for_whom_the_others_wait() -> None:
    queue = started(2, [pieces("ada"), pieces("ada"), pieces("bo")])
    assert decided(queue) == ["open 0", "open 1", "open 2"]
    queue.activations("ada", 0)
    queue.activations("ada", 1)
    assert decided(queue) == ["forward 0 ada"]  # not 1: all would wait for ada
    queue.activations("bo", 2)
    assert decided(queue) == ["forward 2 bo"]
    queue.gradient("bo", 2)
    assert decided(queue) == ["backward 2 bo", "forward 1 ada"]  # nobody else is left


# -- windows ahead --------------------------------------------------------------------------------------------------


def test_the_next_window_is_planned_and_has_credit_while_one_runs() -> None:
    queue = queue_of(1, [[pieces("ada")], [pieces("ada"), pieces("bo")], [pieces("ada")]])
    for client in ("ada", "bo"):
        queue.join(client, 0.0)
    announce(queue, "ada", "bo")
    assert decided(queue) == ["plan 0 ada+bo", "open 0"]
    assert queue.schedule.is_planned and queue.schedule.num_micro_batches == 1 and queue.schedule.masked_tokens == 2
    queue.activations("ada", 0)  # before the window starts
    assert decided(queue) == [], "a forward waits for the start"
    assert queue.start(2, 0.0) == (0, 1)  # another rank has two
    announce(queue, "ada", "bo")
    assert decided(queue) == [
        "plan 1 ada+bo",
        "open 1",  # the dummy, before the next window gets anything
        "open 2",
        "forward 0 ada",
    ]
    queue.activations("ada", 2)
    announce(queue, "ada", "bo")
    assert decided(queue) == [], "only one is planned ahead"
    queue.gradient("ada", 0)
    assert decided(queue) == [
        "backward 0 ada",
        "open 3",
        "forward 1",
        "backward 1 last",
        "step 0 lost 0",
        "plan 2 ada+bo",
    ]
    assert queue.start(2, 0.0) == (2, 3)
    assert decided(queue) == ["forward 2 ada"]
    queue.gradient("ada", 2)
    assert decided(queue) == ["backward 2 ada", "open 4"]
    assert trained(queue, "bo", 3) == ["forward 3 bo", "backward 3 bo last", "step 1 lost 0"]
    assert queue.start(1, 0.0) == (4,)
    assert trained(queue, "ada", 4) == ["forward 4 ada", "backward 4 ada last", "step 2 lost 0"]
    assert not queue.schedule.is_planned


def test_credit_of_the_next_window_never_holds_what_the_running_one_needs() -> None:
    """bo answers for window 1 only when it is done with window 0, in which it shares a micro-batch with ada."""
    queue = queue_of(1, [[pieces("ada"), pieces("ada", "bo")], [pieces("ada"), pieces("ada", "bo"), pieces("bo")]])
    for client in ("ada", "bo"):
        queue.join(client, 0.0)
    announce(queue, "ada", "bo")
    assert decided(queue) == ["plan 0 ada+bo", "open 0"]
    queue.start(2, 0.0)
    announce(queue, "ada", "bo")
    assert decided(queue) == ["plan 1 ada+bo"]
    assert trained(queue, "ada", 0)[-1] == "backward 0 ada"
    queue.activations("ada", 1)
    queue.activations("bo", 1)
    assert "forward 1 ada+bo" in decided(queue)


def test_a_depth_may_change_with_a_window() -> None:
    queue = queue_of(1, [[pieces("ada")] * 3], first_window=5, num_windows=6)
    queue.join("ada", 0.0)
    announce(queue, "ada")
    assert decided(queue) == ["plan 5 ada", "open 0", "open 1"]
    queue.start(3, 0.0, limits=InFlightLimits(2, 2))
    assert decided(queue) == ["open 2"]
    queue.activations("ada", 0)
    queue.activations("ada", 1)
    assert decided(queue) == ["forward 0 ada", "forward 1 ada"]


# -- fixed orders ---------------------------------------------------------------------------------------------------


def test_fixed_order_waits_for_the_oldest() -> None:
    queue = started(2, [pieces("ada"), pieces("bo"), pieces("cy")], order="fixed")
    assert decided(queue) == ["open 0", "open 1", "open 2"]
    queue.activations("cy", 2)
    queue.activations("bo", 1)
    assert decided(queue) == []  # 0 is not there, so nothing may overtake it
    queue.activations("ada", 0)
    assert decided(queue) == ["forward 0 ada", "forward 1 bo"]  # fill to the depth
    queue.gradient("bo", 1)
    assert decided(queue) == []  # 0 was forwarded first, so it is backwarded first
    queue.gradient("ada", 0)
    assert decided(queue) == [
        "backward 0 ada",
        "forward 2 cy",  # one backward, one forward
        "backward 1 bo",
    ]
    queue.gradient("cy", 2)
    assert decided(queue) == ["backward 2 cy last", "step 0 lost 0"]


def test_lockstep_forwards_keep_one_pattern_of_kinds() -> None:
    queue = started(2, [pieces("ada"), pieces("bo"), pieces("cy")], lockstep_forwards=True)
    assert decided(queue) == ["open 0", "open 1", "open 2"]
    queue.activations("cy", 2)
    assert decided(queue) == ["forward 2 cy"]  # the pattern fixes kinds, arrival fixes which
    queue.gradient("cy", 2)
    assert decided(queue) == []  # the second forward comes before any backward, on every rank
    queue.activations("ada", 0)
    assert decided(queue) == ["forward 0 ada", "backward 2 cy"]
    queue.gradient("ada", 0)
    assert decided(queue) == []  # now a forward is due
    queue.activations("bo", 1)
    assert decided(queue) == ["forward 1 bo", "backward 0 ada"]
    queue.gradient("bo", 1)
    assert decided(queue) == ["backward 1 bo last", "step 0 lost 0"]


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("opened", ["forward 0 ada", "backward 0 ada last", "step 0 lost 2"]),
        ("activations", ["forward 0 ada", "backward 0 ada last", "step 0 lost 2"]),
        ("forwarded", ["forward 0 ada+bo", "backward 0 ada last", "step 0 lost 2"]),
        # A gradient that was here in time counts, and so do its masked tokens.
        ("gradient", ["forward 0 ada+bo", "backward 0 ada+bo last", "step 0 lost 0"]),
    ],
)
def test_a_client_lost_at_every_moment(moment: str, expected: list[str]) -> None:
    queue = started(1, [pieces("ada", "bo")])
    assert decided(queue) == ["open 0"]
    words = []
    for event in ("opened", "activations", "forwarded", "gradient"):
        if event == "activations":
            queue.activations("bo", 0)
        elif event == "forwarded":
            queue.activations("ada", 0)
            words += decided(queue)
        elif event == "gradient":
            queue.gradient("bo", 0)
        if event == moment:
            break
    queue.lose("bo")
    if moment in ("opened", "activations"):
        queue.activations("ada", 0)
        words += decided(queue)
    queue.gradient("ada", 0)
    assert words + decided(queue) == expected


def test_lost_after_its_gradient_pieces_keep_their_order() -> None:
    queue = started(1, [pieces("ada", "bo")])
    decided(queue)
    queue.activations("ada", 0)
    queue.activations("bo", 0)
    decided(queue)
    queue.gradient("ada", 0)
    queue.lose("ada")
    queue.gradient("bo", 0)
    assert queue.decide(0.0) == Backward(0, pieces("ada", "bo"), is_last=True)


def test_everybody_lost_leaves_a_window_of_dummies() -> None:
    queue = started(2, [pieces("ada", "bo"), pieces("bo")])
    queue.lose("ada")
    queue.lose("bo")
    queue.lose("bo")  # once more does nothing
    assert decided(queue) == [
        "open 0",
        "open 1",
        "forward 0",  # empty, but the other ranks count on it
        "forward 1",
        "backward 0",
        "backward 1 last",
        "step 0 lost 6",
    ]


def test_who_is_lost_before_the_start_is_not_counted() -> None:
    queue = queue_of(1, [[pieces("ada", "bo")]])
    for client in ("ada", "bo"):
        queue.join(client, 0.0)
    announce(queue, "ada", "bo")
    assert decided(queue) == ["plan 0 ada+bo", "open 0"]
    queue.lose("bo")
    assert queue.schedule.masked_tokens == 2
    queue.start(1, 0.0)
    assert trained(queue, "ada", 0) == ["forward 0 ada", "backward 0 ada last", "step 0 lost 0"]


def test_a_name_that_is_back_has_no_part_in_what_was_planned_before() -> None:
    """Whoever comes back has another batch; its old sequences are gone."""
    queue = queue_of(1, [[pieces("ada", "bo")]], deadlines=Deadlines(10.0))
    for client in ("ada", "bo"):
        queue.join(client, 0.0)
    announce(queue, "ada", "bo")
    assert decided(queue) == ["plan 0 ada+bo", "open 0"]
    queue.lose("bo")
    queue.join("bo", 1.0)
    queue.start(1, 0.0)
    with pytest.raises(WireError, match="nobody asked for"):
        queue.activations("bo", 0)
    assert trained(queue, "ada", 0) == ["forward 0 ada", "backward 0 ada last", "step 0 lost 0"]


# -- late clients ---------------------------------------------------------------------------------------------------


def late_bo(silence_timeout: float = math.inf) -> PipelineQueue:
    """ada and bo in window 0 of four, window 1 planned; bo is late, ada is not."""
    plan = [pieces("ada"), pieces("bo")]
    queue = queue_of(
        2, [plan, plan, [pieces("ada")], plan], deadlines=Deadlines(silence_timeout, FixedAnswerTimes(5.0))
    )
    for client in ("ada", "bo"):
        queue.join(client, 0.0)
    announce(queue, "ada", "bo")
    assert decided(queue) == ["plan 0 ada+bo", "open 0", "open 1"]
    queue.start(2, 0.0)
    announce(queue, "ada", "bo")
    assert decided(queue) == ["plan 1 ada+bo", "open 2", "open 3"]
    queue.activations("ada", 0)
    assert decided(queue, 5.0) == ["forward 0 ada"]
    queue.gradient("ada", 0)
    return queue


def test_a_window_goes_on_without_a_late_client_and_it_comes_back() -> None:
    queue = late_bo()
    assert decided(queue, 5.5) == [
        "suspend bo ((0, 1), (1, 3))",  # of both windows
        "forward 1",
        "backward 0 ada",
        "backward 1 last",
        "step 0 lost 2",
    ]
    assert queue.clients == {"ada", "bo"} and queue.active == {"ada"}
    assert queue.was_skipped("bo", 1) and queue.was_skipped("bo", 3) and not queue.was_skipped("ada", 0)
    assert queue.schedule.masked_tokens == 2, "what was dropped before the start is not in M"
    announce(queue, "ada")
    queue.start(2, 6.0)
    assert decided(queue, 6.0)[0] == "plan 2 ada", "nobody waits for bo"
    queue.reactivate("bo", 7.0)  # its answer to micro-batch 1, say
    assert queue.active == {"ada", "bo"}
    assert queue.manifest(Manifest("bo", 2, (4,), (2,))) is False, "that window was planned without it"
    assert queue.next_window == 3
    announce(queue, "ada", "bo")
    assert trained(queue, "ada", 2, 7.0)[-4:] == ["step 1 lost 0", "plan 3 ada+bo", "open 5", "open 6"]
    queue.start(1, 8.0)
    assert trained(queue, "ada", 4, 8.0)[-1] == "step 2 lost 0"
    queue.start(2, 9.0)
    assert trained(queue, "ada", 5, 9.0)[-1] == "backward 5 ada"
    assert trained(queue, "bo", 6, 9.0)[-1] == "step 3 lost 0"


def test_a_late_client_that_gave_its_manifest_is_told_that_it_is_passed_over() -> None:
    queue = late_bo()
    assert decided(queue, 5.5)[-1] == "step 0 lost 2"
    announce(queue, "ada", "bo")  # without `heard`: it came before bo was late
    assert decided(queue, 5.5) == ["plan 2 ada without bo", "open 4"]


def test_a_gradient_in_time_counts_though_its_client_is_late_then() -> None:
    queue = started(2, [pieces("ada", "bo"), pieces("bo")], deadlines=Deadlines(answer_times=FixedAnswerTimes(5.0)))
    decided(queue)
    queue.activations("ada", 0)
    queue.activations("bo", 0)
    assert decided(queue, 1.0) == ["forward 0 ada+bo"]
    queue.gradient("bo", 0)
    assert decided(queue, 1.0) == []
    queue.gradient("ada", 0)
    assert decided(queue, 5.5) == ["backward 0 ada+bo"], "who has answered something since is not late"
    assert decided(queue, 6.5) == ["suspend bo ((0, 1),)", "forward 1", "backward 1 last", "step 0 lost 2"]


@pytest.mark.parametrize("is_alone", [True, False])
def test_when_everybody_is_late_no_window_begins_unless_other_ranks_have_somebody(is_alone: bool) -> None:
    """A network that is down for a minute must not use up the run's windows."""
    queue = queue_of(1, [[pieces("ada")]] * 5, deadlines=Deadlines(60.0, FixedAnswerTimes(5.0)))
    queue.join("ada", 0.0)
    announce(queue, "ada")
    assert decided(queue) == ["plan 0 ada", "open 0"]
    queue.start(1, 0.0, is_alone=is_alone)
    decisions = decided(queue, 5.5)
    assert decisions[0] == "suspend ada ((0, 0),)" and not queue.active
    assert "step 0 lost 2" in decisions and ("plan 1" in decisions) != is_alone
    if is_alone:
        queue.reactivate("ada", 9.0)
        announce(queue, "ada")
        assert decided(queue, 9.0)[0] == "plan 1 ada"


def test_a_late_client_is_silent_since_its_first_open_question() -> None:
    queue = late_bo(10.0)
    assert decided(queue, 5.5)[0] == "suspend bo ((0, 1), (1, 3))"
    announce(queue, "ada")
    assert "expire bo" not in decided(queue, 10.0)
    assert decided(queue, 10.5)[-1] == "expire bo"
    assert queue.clients == {"ada"}


# -- manifests and the clock ----------------------------------------------------------------------------------------


def test_a_manifest_comes_once() -> None:
    queue = queue_of(1, [[pieces("ada")]] * 2)
    queue.join("ada", 0.0)
    announce(queue, "ada")
    with pytest.raises(WireError, match="second manifest of window 0"):
        announce(queue, "ada")
    assert decided(queue) == ["plan 0 ada", "open 0"]
    announce(queue, "ada")
    assert decided(queue) == ["plan 1 ada", "open 1"], "one ahead of the one that has not started"


def test_a_window_cannot_start_inside_another_or_unplanned() -> None:
    queue = started(1, [pieces("ada")])
    with pytest.raises(RuntimeError, match="has not stepped"):
        queue.start(1, 0.0)
    with pytest.raises(RuntimeError, match="not planned"):
        queue_of(1, [[]]).start(1, 0.0)


@pytest.mark.parametrize("owed", ["manifest", "activations", "gradient"])
def test_silence_is_measured_from_the_question(owed: str) -> None:
    """A client expires once it has owed one answer for longer than the timeout, whatever it owed before."""
    queue = queue_of(1, [[pieces("ada")]] * 2, deadlines=Deadlines(10.0))
    asked = 0.0
    queue.join("ada", asked)
    if owed != "manifest":
        announce(queue, "ada")
        asked = 1000.0
        assert decided(queue, asked) == ["plan 0 ada", "open 0"]
        queue.start(1, asked)
        announce(queue, "ada")
    if owed == "gradient":
        queue.activations("ada", 0)
        asked = 1009.0
        assert decided(queue, asked) == ["plan 1 ada", "open 1", "forward 0 ada"]
    assert "expire ada" not in decided(queue, asked + 10.0)
    assert decided(queue, math.nextafter(asked + 10.0, math.inf))[0] == "expire ada"
    assert queue.clients == frozenset()


def test_no_clock_runs_for_a_window_that_has_not_started() -> None:
    """Its clients answer when they are done with the one before."""
    queue = queue_of(1, [[pieces("ada")]], deadlines=Deadlines(10.0))
    queue.join("ada", 0.0)
    announce(queue, "ada")
    assert decided(queue, 0.0) == ["plan 0 ada", "open 0"]
    assert decided(queue, 1000.0) == []
    queue.start(1, 1000.0)
    assert decided(queue, 1010.0) == []
    assert decided(queue, 1010.5)[0] == "expire ada"


def test_the_oldest_unanswered_question_counts() -> None:
    queue = started(1, [pieces("ada"), pieces("ada"), pieces("ada")], deadlines=Deadlines(10.0))
    assert decided(queue, 0.0) == ["open 0", "open 1"]
    queue.activations("ada", 0)
    assert decided(queue, 6.0) == ["forward 0 ada"]
    queue.gradient("ada", 0)
    assert decided(queue, 9.0) == ["backward 0 ada", "open 2"]
    assert decided(queue, 10.0) == []
    assert decided(queue, 10.5)[0] == "expire ada"  # 1 was asked for at 0, whatever came since


def test_time_in_which_the_rank_is_busy_is_nobodys_silence() -> None:
    queue = queue_of(1, [[pieces("ada")]], deadlines=Deadlines(10.0))
    queue.join("ada", 0.0)
    queue.join("bo", 1.0)
    queue.deadlines.stop_clocks(100.0)
    assert decided(queue, 110.0) == []
    assert decided(queue, 110.5) == ["expire ada"]
    announce(queue, "bo")
    queue.deadlines.stop_clocks(1.0)
    assert "expire bo" not in decided(queue, 1000.0)


def test_a_window_begins_where_the_run_resumes() -> None:
    queue = queue_of(1, [[]], first_window=7, num_windows=8)
    queue.join("ada", 0.0)
    with pytest.raises(WireError, match="manifest of window 0 instead of 7"):
        queue.manifest(Manifest("ada", 0, (4,), (2,)))
    announce(queue, "ada")
    assert decided(queue) == ["plan 7 ada"]
