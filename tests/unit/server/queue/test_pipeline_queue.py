"""The pipeline queue: exact orders of small windows, by arrival, with windows ahead, in a fixed
order, in lockstep.
"""

from __future__ import annotations

import pytest
from unit.server.queue.by_hand import announce, decided, pieces, queue_of, started, trained

from fedbert_ds.errors import WireError
from fedbert_ds.server.queue.decisions import Backward, Forward, Open, Plan
from fedbert_ds.server.queue.in_flight import InFlightLimits
from fedbert_ds.wire.messages import Manifest


def test_order_of_arrival() -> None:
    queue = started(1, [pieces("ada"), pieces("ada", "bo"), pieces("bo"), pieces("bo")])
    assert decided(queue) == [
        "open 0",
        "open 2",  # not 1: ada has its part of the credit already; and no more than twice the limit
    ]
    queue.answer("bo", 2, "activations")
    queue.answer("ada", 0, "activations")
    assert decided(queue) == [
        "forward 2 bo",  # complete before 0 was; then no more may be in flight
    ]
    queue.answer("bo", 2, "gradient")
    assert decided(queue) == [
        "backward 2 bo",  # its graph makes room
        "open 1",  # credit as soon as a place is free; neither owes anything, so the plan decides
        "forward 0 ada",  # complete since long
    ]
    queue.answer("ada", 1, "activations")
    queue.answer("ada", 0, "gradient")
    assert decided(queue) == ["backward 0 ada", "open 3"]  # 1 still waits for bo, who has all credit that is left
    queue.answer("bo", 1, "activations")
    assert decided(queue) == ["forward 1 ada+bo"]
    queue.answer("bo", 3, "activations")
    queue.answer("bo", 1, "gradient")
    assert decided(queue) == []
    queue.answer("ada", 1, "gradient")
    assert decided(queue) == ["backward 1 ada+bo", "forward 3 bo"]
    queue.answer("bo", 3, "gradient")
    assert decided(queue) == [
        "backward 3 bo",
        "step 0 lost 0",
    ]


def test_a_window_without_micro_batches_steps_at_once_and_the_next_is_planned_meanwhile() -> None:
    """Clients that hold the whole model announce windows, and compute them by themselves."""
    queue = queue_of(1, [[], []])
    for client in ("ada", "bo"):
        queue.join(client, 0.0)
    for number in range(2):
        announce(queue, "ada", "bo")
        plan = queue.decide(0.0)
        assert isinstance(plan, Plan) and (plan.window, plan.micro_batches) == (number, ())
        assert {manifest.client for manifest in plan.manifests} == {"ada", "bo"}
        assert queue.start(0, 0.0) == ()
        assert decided(queue) == [f"step {number} lost 0"]
    assert decided(queue) == []


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
    queue.answer("ada", 0, "activations")
    assert decided(queue) == ["forward 0 ada"]
    queue.answer("ada", 0, "gradient")
    queue.answer("bo", 1, "activations")
    assert decided(queue) == ["forward 1 bo", "backward 0 ada"]  # the gradient was first, but there is room
    queue.answer("bo", 1, "gradient")
    queue.answer("cy", 2, "activations")
    assert decided(queue) == ["forward 2 cy", "backward 1 bo"]
    queue.answer("cy", 2, "gradient")
    assert decided(queue) == ["backward 2 cy", "step 0 lost 0"]


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
        queue.answer(client, index, "activations")
    assert decided(queue) == ["forward 2 cy", "forward 0 ada", "forward 1 bo"]  # as they became complete
    queue.answer("bo", 1, "gradient")
    queue.answer("cy", 2, "gradient")
    queue.answer("ada", 0, "gradient")
    assert decided(queue) == ["backward 1 bo", "backward 2 cy", "backward 0 ada", "step 0 lost 0"]


def test_a_dummy_lets_real_work_go_first() -> None:
    queue = started(3, [pieces("ada"), pieces("ada"), ()])
    assert [queue.decide(0.0) for _ in range(3)] == [
        Open(0, 0, pieces("ada")),
        Open(0, 1, pieces("ada")),
        Open(0, 2, ()),
    ]
    queue.answer("ada", 0, "activations")
    assert queue.decide(0.0) == Forward(0, pieces("ada"))  # the dummy was ready before it
    assert queue.decide(0.0) == Forward(2, ())
    queue.answer("ada", 1, "activations")
    assert queue.decide(0.0) == Forward(1, pieces("ada"))  # the dummy's gradient was there before, and is a backward
    queue.answer("ada", 0, "gradient")
    assert queue.decide(0.0) == Backward(0, pieces("ada"))
    assert queue.decide(0.0) == Backward(2, ())
    queue.answer("ada", 1, "gradient")
    assert queue.decide(0.0) == Backward(1, pieces("ada"))


def test_the_last_place_in_flight_is_not_for_blockers() -> None:
    queue = started(2, [pieces("ada"), pieces("ada"), pieces("bo")])
    assert decided(queue) == ["open 0", "open 1", "open 2"]
    queue.answer("ada", 0, "activations")
    queue.answer("ada", 1, "activations")
    assert decided(queue) == ["forward 0 ada"]  # not 1: all would wait for ada
    queue.answer("bo", 2, "activations")
    assert decided(queue) == ["forward 2 bo"]
    queue.answer("bo", 2, "gradient")
    assert decided(queue) == ["backward 2 bo", "forward 1 ada"]  # nobody else is left


# -- windows ahead ---------------------------------------------------------------------------------


def test_the_next_window_is_planned_and_has_credit_while_one_runs() -> None:
    queue = queue_of(1, [[pieces("ada")], [pieces("ada"), pieces("bo")], [pieces("ada")]])
    for client in ("ada", "bo"):
        queue.join(client, 0.0)
    announce(queue, "ada", "bo")
    assert decided(queue) == ["plan 0 ada+bo", "open 0"]
    assert queue.schedule.is_planned and queue.schedule.num_micro_batches == 1 and queue.schedule.masked_tokens == 2
    queue.answer("ada", 0, "activations")  # before the window starts
    assert decided(queue) == [], "a forward waits for the start"
    assert queue.start(2, 0.0) == (0, 1)  # another rank has two
    announce(queue, "ada", "bo")
    assert decided(queue) == [
        "plan 1 ada+bo",
        "open 1",  # the dummy, before the next window gets anything
        "open 2",
        "forward 0 ada",
    ]
    queue.answer("ada", 2, "activations")
    announce(queue, "ada", "bo")
    assert decided(queue) == [], "only one is planned ahead"
    queue.answer("ada", 0, "gradient")
    assert decided(queue) == [
        "backward 0 ada",
        "open 3",
        "forward 1",
        "backward 1",
        "step 0 lost 0",
        "plan 2 ada+bo",
    ]
    assert queue.start(2, 0.0) == (2, 3)
    assert decided(queue) == ["forward 2 ada"]
    queue.answer("ada", 2, "gradient")
    assert decided(queue) == ["backward 2 ada", "open 4"]
    assert trained(queue, "bo", 3) == ["forward 3 bo", "backward 3 bo", "step 1 lost 0"]
    assert queue.start(1, 0.0) == (4,)
    assert trained(queue, "ada", 4) == ["forward 4 ada", "backward 4 ada", "step 2 lost 0"]
    assert not queue.schedule.is_planned


def test_credit_of_the_next_window_never_holds_what_the_running_one_needs() -> None:
    """bo answers for window 1 only when it is done with window 0, in which it shares a micro-batch
    with ada.
    """
    queue = queue_of(1, [[pieces("ada"), pieces("ada", "bo")], [pieces("ada"), pieces("ada", "bo"), pieces("bo")]])
    for client in ("ada", "bo"):
        queue.join(client, 0.0)
    announce(queue, "ada", "bo")
    assert decided(queue) == ["plan 0 ada+bo", "open 0"]
    queue.start(2, 0.0)
    announce(queue, "ada", "bo")
    assert decided(queue) == ["plan 1 ada+bo"]
    assert trained(queue, "ada", 0)[-1] == "backward 0 ada"
    queue.answer("ada", 1, "activations")
    queue.answer("bo", 1, "activations")
    assert "forward 1 ada+bo" in decided(queue)


def test_limits_may_change_with_a_window() -> None:
    queue = queue_of(1, [[pieces("ada")] * 3], first_window=5, num_windows=6)
    queue.join("ada", 0.0)
    announce(queue, "ada")
    assert decided(queue) == ["plan 5 ada", "open 0", "open 1"]
    queue.start(3, 0.0, limits=InFlightLimits(2, 2))
    assert decided(queue) == ["open 2"]
    queue.answer("ada", 0, "activations")
    queue.answer("ada", 1, "activations")
    assert decided(queue) == ["forward 0 ada", "forward 1 ada"]


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


def test_a_window_begins_where_the_run_resumes() -> None:
    queue = queue_of(1, [[]], first_window=7, num_windows=8)
    queue.join("ada", 0.0)
    with pytest.raises(WireError, match="manifest of window 0 instead of 7"):
        queue.manifest(Manifest("ada", 0, (4,), (2,)))
    announce(queue, "ada")
    assert decided(queue) == ["plan 7 ada"]


# -- fixed orders ----------------------------------------------------------------------------------


def test_fixed_order_waits_for_the_oldest() -> None:
    queue = started(2, [pieces("ada"), pieces("bo"), pieces("cy")], order="fixed")
    assert decided(queue) == ["open 0", "open 1", "open 2"]
    queue.answer("cy", 2, "activations")
    queue.answer("bo", 1, "activations")
    assert decided(queue) == []  # 0 is not there, so nothing may overtake it
    queue.answer("ada", 0, "activations")
    assert decided(queue) == ["forward 0 ada", "forward 1 bo"]  # fill to the limit
    queue.answer("bo", 1, "gradient")
    assert decided(queue) == []  # 0 was forwarded first, so it is backwarded first
    queue.answer("ada", 0, "gradient")
    assert decided(queue) == [
        "backward 0 ada",
        "forward 2 cy",  # one backward, one forward
        "backward 1 bo",
    ]
    queue.answer("cy", 2, "gradient")
    assert decided(queue) == ["backward 2 cy", "step 0 lost 0"]


def test_lockstep_forwards_keep_one_pattern_of_kinds() -> None:
    queue = started(2, [pieces("ada"), pieces("bo"), pieces("cy")], lockstep_forwards=True)
    assert decided(queue) == ["open 0", "open 1", "open 2"]
    queue.answer("cy", 2, "activations")
    assert decided(queue) == ["forward 2 cy"]  # the pattern fixes kinds, arrival fixes which
    queue.answer("cy", 2, "gradient")
    assert decided(queue) == []  # the second forward comes before any backward, on every rank
    queue.answer("ada", 0, "activations")
    assert decided(queue) == ["forward 0 ada", "backward 2 cy"]
    queue.answer("ada", 0, "gradient")
    assert decided(queue) == []  # now a forward is due
    queue.answer("bo", 1, "activations")
    assert decided(queue) == ["forward 1 bo", "backward 0 ada"]
    queue.answer("bo", 1, "gradient")
    assert decided(queue) == ["backward 1 bo", "step 0 lost 0"]
