"""The pipeline queue: what holds in any order of arrivals, what is refused, and exact orders of small windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.server.simulation import Federation, Lengths

from fedbert_ds.errors import WireError
from fedbert_ds.server.pipeline_queue import Backward, Expire, Forward, Open, PipelineQueue, Step
from fedbert_ds.server.window import MicroBatch, Piece
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
    drawn: dict[str, Any] = {
        "num_ranks": data.draw(st.integers(1, 4), label="ranks"),
        "depth": data.draw(st.integers(1, 4), label="micro-batches in flight"),
        "order": data.draw(st.sampled_from(["arrival", "fixed"]), label="order"),
        "lockstep_forwards": data.draw(st.booleans(), label="lockstep forwards"),
    }
    return Federation(**(drawn | fixed), lengths=lengths, capacity=CAPACITY)


ANY_ORDER = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@ANY_ORDER
@given(data=st.data())
def test_any_arrivals_losses_and_clocks(data: st.DataObject) -> None:
    """Whoever joins, leaves, is slow or falls silent, and when: `simulation` compares each decision with its books."""
    choose = chooser(data)
    timeout = 10.0
    federation = drawn_federation(data, drawn_lengths(data), timeout=timeout)
    num_ranks = len(federation.ranks)
    for name in NAMES[: data.draw(st.integers(0, 6), label="clients")]:
        federation.join(choose(range(num_ranks)), name, is_mute=choose([False, False, False, True]))
    windows = data.draw(st.integers(1, 3), label="windows")
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
            federation.now += choose([0.1, 1.0, 4.0, timeout + 0.5])
        elif what == "lose" and connected:
            federation.lose(*choose(connected))
        elif what == "join" and (absent := sorted(set(NAMES) - {name for _, name in connected})):
            federation.join(choose(range(num_ranks)), choose(absent))
    federation.run(windows, choose)
    sequences = [[kind for kind in rank.collectives if kind != "Open"] for rank in federation.ranks]
    assert all(sequence == sequences[0] for sequence in sequences)


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
    federation.run(2, chooser(data))
    assert [sum(rank.lost_masked_tokens) for rank in federation.ranks] == [0] * len(federation.ranks)
    assert not federation.expired


@ANY_ORDER
@given(data=st.data())
def test_fixed_order_follows_the_manifests_alone(data: st.DataObject) -> None:
    """Two runs with the same manifests and other arrivals decide the same things in the same order."""
    lengths = drawn_lengths(data)
    options = {
        "num_ranks": data.draw(st.integers(1, 3)),
        "depth": data.draw(st.integers(1, 3)),
        "lockstep_forwards": data.draw(st.booleans()),
    }
    decisions = []
    for choose in (lambda options: options[0], chooser(data)):
        federation = Federation(**options, order="fixed", lengths=lengths, capacity=CAPACITY)
        for number, name in enumerate(NAMES[:4]):
            federation.join(number % options["num_ranks"], name)
        federation.run(2, choose)
        decisions.append([rank.decisions for rank in federation.ranks])
    assert decisions[0] == decisions[1]


@pytest.mark.parametrize("order", ["arrival", "fixed"])
@pytest.mark.parametrize("lockstep_forwards", [False, True])
def test_a_client_that_never_answers_expires_and_the_window_ends(order, lockstep_forwards: bool) -> None:
    federation = Federation(
        num_ranks=2, depth=2, order=order, lockstep_forwards=lockstep_forwards, timeout=30.0,
        lengths=lambda client, window: ((5, 5, 5), (1, 2, 1)), capacity=10,
    )  # fmt: skip
    for number, name in enumerate(NAMES[:4]):
        federation.join(number % 2, name, is_mute=name == "bo")
    federation.run(3)
    assert federation.expired == ["bo"]
    assert federation.ranks[1].lost_masked_tokens == [4, 0, 0]
    assert federation.ranks[0].lost_masked_tokens == [0, 0, 0]


@ANY_ORDER
@given(data=st.data())
def test_arrival_order_does_not_wait_for_a_slow_client(data: st.DataObject) -> None:
    """All that a silent client has no part in is backwarded before it expires, however much text it announced."""
    depth = data.draw(st.integers(1, 4), label="micro-batches in flight")
    federation = Federation(num_ranks=1, depth=depth, lengths=drawn_lengths(data), capacity=CAPACITY)
    names = NAMES[: data.draw(st.integers(2, 5), label="clients")]
    mute = data.draw(st.sampled_from(names), label="silent")
    for name in names:
        federation.join(0, name, is_mute=name == mute)
    choose = chooser(data)
    while True:
        if federation.decide_all():
            continue
        if not (actions := federation.possible()):
            break
        federation.do(choose(actions))
    left = [entry.plan for entry in federation.ranks[0].micro_batches.values() if entry.backwarded is None]
    assert all(mute in {piece.client for piece in micro_batch.pieces} for micro_batch in left)
    assert left and federation.finished == 0


# -- exact orders ---------------------------------------------------------------------------------------------------


def pieces(*clients: str) -> tuple[Piece, ...]:
    return tuple(Piece(client, 0, 1, tokens=4, masked=2) for client in clients)


def started(
    depth: int,
    plan: Sequence[tuple[Piece, ...]],
    order: Literal["arrival", "fixed"] = "arrival",
    **options: Any,
) -> PipelineQueue:
    """A queue in window 0 of this plan."""
    queue = PipelineQueue(depth, order, **options)
    for client in sorted({piece.client for micro_batch in plan for piece in micro_batch}):
        queue.join(client, 0.0)
        queue.manifest(Manifest(client, 0, (4,), (2,)))
    queue.start(0, [MicroBatch(index, micro_batch) for index, micro_batch in enumerate(plan)])
    return queue


def decided(queue: PipelineQueue, now: float = 0.0) -> list[str]:
    """Decisions until the queue waits, in short: `open 0`, `forward 0 ada+bo`, `backward 0 ada last`."""
    words = []
    while (decision := queue.decide(now)) is not None:
        match decision:
            case Open(index, _):
                words.append(f"open {index}")
            case Forward(index, done):
                words.append(f"forward {index} {'+'.join(piece.client for piece in done)}".rstrip())
            case Backward(index, done, is_last):
                clients = "+".join(piece.client for piece in done)
                words.append(" ".join(filter(None, [f"backward {index}", clients, "last" if is_last else ""])))
            case Expire(client):
                words.append(f"expire {client}")
            case Step(window, lost):
                words.append(f"step {window} lost {lost}")
    return words


def test_order_of_arrival() -> None:
    queue = started(1, [pieces("ada"), pieces("ada", "bo"), pieces("bo"), pieces("bo")])
    assert decided(queue) == [
        "open 0",
        "open 2",  # not 1: ada owes an answer already; and no more than twice the depth
    ]
    queue.activations("bo", 2)
    queue.activations("ada", 0)
    assert decided(queue) == [
        "forward 2 bo",  # complete before 0 was; then the depth is reached
    ]
    queue.gradient("bo", 2)
    assert decided(queue) == [
        "backward 2 bo",  # its graph makes room
        "open 1",  # credit as soon as a place is free; nobody owes anything, so the plan decides
        "forward 0 ada",  # complete since long
    ]
    queue.activations("ada", 1)
    queue.gradient("ada", 0)
    assert decided(queue) == [
        "backward 0 ada",
        "open 3",
    ]
    queue.activations("bo", 3)
    assert decided(queue) == ["forward 3 bo"]  # 1 still waits for bo
    queue.activations("bo", 1)
    queue.gradient("bo", 3)
    assert decided(queue) == [
        "backward 3 bo",  # before the forward of 1, complete for longer: it frees memory
        "forward 1 ada+bo",
    ]
    queue.gradient("bo", 1)
    assert decided(queue) == []
    queue.gradient("ada", 1)
    assert decided(queue) == [
        "backward 1 ada+bo last",  # the gradient-accumulation boundary
        "step 0 lost 0",
    ]


def test_credit_is_spread_over_clients() -> None:
    """At the start of a window all clients have work, not only the first of them by name."""
    queue = started(2, [pieces("ada")] * 4 + [pieces("bo")] * 2 + [pieces("cy"), ()])
    assert decided(queue) == [
        "open 0",  # ada
        "open 4",  # bo
        "open 6",  # cy
        "open 1",  # everybody owes one, so the plan decides
    ]


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
    assert [queue.decide(0.0) for _ in range(3)] == [Open(0, pieces("ada")), Open(1, pieces("ada")), Open(2, ())]
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
        "backward 0",
        "forward 1",
        "backward 1 last",
        "step 0 lost 6",
    ]
    assert queue.gathered and queue.manifests == ()


def test_one_name_back_between_plan_and_start_is_not_in_the_plan() -> None:
    """Whoever comes back has another batch; its old sequences are gone."""
    queue = PipelineQueue(1, silence_timeout=10.0)
    for client in ("ada", "bo"):
        queue.join(client, 0.0)
        queue.manifest(Manifest(client, 0, (4,), (2,)))
    queue.lose("bo")
    queue.join("bo", 1.0)
    queue.start(0, [MicroBatch(0, pieces("ada", "bo"))])
    assert queue.decide(20.0) == Open(0, pieces("ada"))  # and bo owes nothing while the window runs
    queue.activations("ada", 0)
    assert decided(queue, 20.0) == ["forward 0 ada"]
    queue.gradient("ada", 0)
    assert decided(queue, 20.0) == ["backward 0 ada last", "step 0 lost 2"]
    assert decided(queue, 29.0) == []
    assert decided(queue, 31.0) == ["expire ada", "expire bo"]  # both owe the next manifest since the step


# -- manifests and the clock ----------------------------------------------------------------------------------------


def test_manifests_may_come_early() -> None:
    queue = started(1, [pieces("ada")])
    queue.manifest(Manifest("ada", 1, (3,), (1,)))
    with pytest.raises(WireError, match="second manifest of window 1"):
        queue.manifest(Manifest("ada", 1, (3,), (1,)))
    assert not queue.gathered  # the running window comes first
    decided(queue)
    queue.activations("ada", 0)
    decided(queue)
    queue.gradient("ada", 0)
    assert decided(queue) == ["backward 0 ada last", "step 0 lost 0"]
    assert queue.gathered and queue.manifests == (Manifest("ada", 1, (3,), (1,)),)
    queue.start(1, [MicroBatch(0, pieces("ada"))])
    assert decided(queue) == ["open 0"]


def test_a_window_cannot_start_inside_another() -> None:
    queue = started(1, [pieces("ada")])
    with pytest.raises(RuntimeError, match="has not stepped"):
        queue.start(1, [MicroBatch(0, ())])


@pytest.mark.parametrize("owed", ["manifest", "activations", "gradient", "next manifest"])
def test_silence_is_measured_from_the_question(owed: str) -> None:
    """A client expires once it has owed one answer for longer than the timeout, whatever it owed before."""
    queue = PipelineQueue(1, silence_timeout=10.0)
    asked = 0.0
    queue.join("ada", asked)
    if owed != "manifest":
        queue.manifest(Manifest("ada", 0, (4,), (2,)))
        assert decided(queue, 1000.0) == []  # it owes nothing
        queue.start(0, [MicroBatch(0, pieces("ada"))])
        asked = 1000.0
        assert decided(queue, asked) == ["open 0"]
    if owed in ("gradient", "next manifest"):
        queue.activations("ada", 0)
        asked = 1009.0
        assert decided(queue, asked) == ["forward 0 ada"]
    if owed == "next manifest":
        queue.gradient("ada", 0)
        asked = 1018.0
        assert decided(queue, asked) == ["backward 0 ada last", "step 0 lost 0"]
    assert "expire ada" not in decided(queue, asked + 10.0)
    assert decided(queue, math.nextafter(asked + 10.0, math.inf))[0] == "expire ada"
    assert queue.clients == frozenset()


def test_the_oldest_unanswered_question_counts() -> None:
    queue = started(1, [pieces("ada"), pieces("ada"), pieces("ada")], silence_timeout=10.0)
    assert decided(queue, 0.0) == ["open 0", "open 1"]
    queue.activations("ada", 0)
    assert decided(queue, 6.0) == ["forward 0 ada"]
    queue.gradient("ada", 0)
    assert decided(queue, 9.0) == ["backward 0 ada", "open 2"]
    assert decided(queue, 10.0) == []
    assert decided(queue, 10.5)[0] == "expire ada"  # 1 was asked for at 0, whatever came since


def test_time_in_which_the_rank_is_busy_is_nobodys_silence() -> None:
    queue = PipelineQueue(1, silence_timeout=10.0)
    queue.join("ada", 0.0)
    queue.join("bo", 1.0)
    queue.excuse(100.0)
    assert decided(queue, 110.0) == []
    assert decided(queue, 110.5) == ["expire ada"]
    queue.manifest(Manifest("bo", 0, (4,), (2,)))
    queue.excuse(1.0)
    assert decided(queue, 1000.0) == []


def test_a_window_begins_where_the_run_resumes() -> None:
    queue = PipelineQueue(1, first_window=7)
    queue.join("ada", 0.0)
    with pytest.raises(WireError, match="manifest of window 0 instead of 7"):
        queue.manifest(Manifest("ada", 0, (4,), (2,)))
    queue.manifest(Manifest("ada", 7, (4,), (2,)))
    assert queue.gathered
