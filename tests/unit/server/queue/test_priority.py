"""Whose turn it is: each rule alone, on windows brought by hand to where the rule decides."""

from __future__ import annotations

from unit.server.queue.by_hand import bring, pieces, scheduled

from fedbert_ds.server.queue.decisions import Backward, Forward
from fedbert_ds.server.queue.in_flight import InFlightLimits
from fedbert_ds.server.queue.priority import (
    blockers,
    credit_taken,
    fair_share,
    lockstep_pattern,
    next_backward,
    next_forward,
    next_lockstep_forward,
    next_to_compute,
    next_to_open,
)
from fedbert_ds.server.queue.schedule import PlannedMicroBatch, Schedule, State

WIDE = InFlightLimits(100, 100)


def index_of(chosen: PlannedMicroBatch | None) -> int | None:
    return None if chosen is None else chosen.index


def opened(schedule: Schedule, limits: InFlightLimits = WIDE, is_fixed: bool = False) -> list[int]:
    """Micro-batches that get credit, in order, until no more do."""
    indices = []
    while (chosen := next_to_open(schedule.windows, limits, is_fixed)) is not None:
        schedule.open(*chosen)
        indices.append(chosen[1].index)
    return indices


# -- credit ----------------------------------------------------------------------------------------


def test_a_fair_share_is_all_credit_by_the_clients_that_want_some_rounded_up() -> None:
    assert fair_share(InFlightLimits(2, 4), 1) == 6
    assert fair_share(InFlightLimits(2, 4), 4) == 2
    assert fair_share(InFlightLimits(2, 4), 100) == 1
    assert fair_share(InFlightLimits(2, 4), 0) == 6


def test_credit_is_taken_by_answers_that_are_owed() -> None:
    schedule = scheduled("ada+bo", "bo", "cy")
    for index, state in ((0, State.OPEN), (1, State.FORWARDED)):
        bring(schedule, index, state)
    assert credit_taken(list(schedule.live)) == {"ada": 1, "bo": 2}


def test_activations_that_wait_for_a_forward_count_for_who_owes_something_too() -> None:
    schedule = scheduled("ada", "ada", "bo")
    for index, state in ((0, State.READY), (1, State.OPEN), (2, State.READY)):
        bring(schedule, index, state)
    assert credit_taken(list(schedule.live)) == {"ada": 2}, "bo owes nothing"


def test_credit_goes_in_the_order_of_the_plan() -> None:
    assert opened(scheduled("bo", "ada", "cy")) == [0, 1, 2]


def test_nobody_gets_more_than_a_fair_share() -> None:
    limits = InFlightLimits(2, 2)
    assert opened(scheduled("ada", "ada", "ada", "bo", "bo", "bo"), limits) == [0, 1, 3, 4]


def test_a_shared_micro_batch_waits_until_all_its_clients_may_have_more() -> None:
    limits = InFlightLimits(1, 1)
    assert opened(scheduled("ada", "ada+bo", "bo"), limits) == [0, 2], "one each; the shared one would be ada's second"


def test_credit_is_no_more_than_the_limits_allow() -> None:
    schedule = scheduled(*["ada"] * 6)
    assert opened(schedule, InFlightLimits(2, 3)) == [0, 1, 2, 3, 4]
    bring(schedule, 0, State.GRADIENTS_READY)
    assert opened(schedule, InFlightLimits(2, 3)) == [], "a graph holds a place as activations do"
    bring(schedule, 0, State.DONE)
    assert opened(schedule, InFlightLimits(2, 3)) == [5]


def test_dummies_have_places_of_their_own_and_come_last() -> None:
    limits = InFlightLimits(1, 1)
    schedule = scheduled("ada", "ada", "ada", num_micro_batches=8)
    assert opened(schedule, limits) == [0, 1, 3, 4], "ada has its share; dummies take none of it, and are as many"
    bring(schedule, 0, State.DONE)
    assert opened(schedule, limits) == [2]
    bring(schedule, 3, State.DONE)
    assert opened(schedule, limits) == [5]


def test_the_next_window_waits_until_this_one_has_all_its_credit() -> None:
    schedule = scheduled("ada", "ada+bo")
    schedule.plan(1, [pieces("cy"), pieces("bo")])
    limits = InFlightLimits(1, 1)
    assert opened(schedule, limits) == [0], "1 is not fair yet, and 2 would hold its place"
    bring(schedule, 0, State.DONE)
    assert opened(schedule, limits) == [1, 2]


def test_a_fixed_order_gives_credit_by_the_plan_alone() -> None:
    schedule = scheduled("ada", "ada", "ada", "ada", "bo")
    assert opened(schedule, InFlightLimits(2, 2), is_fixed=True) == [0, 1, 2, 3], "whatever is fair"
    bring(schedule, 1, State.DONE)
    assert opened(schedule, InFlightLimits(2, 2), is_fixed=True) == [4]


def test_a_fixed_order_does_not_let_what_lost_its_clients_go_ahead_of_its_place() -> None:
    schedule = scheduled("ada", "bo", "cy")
    schedule.drop("bo")
    assert opened(schedule, is_fixed=True) == [0, 1, 2]


# -- computing -------------------------------------------------------------------------------------


def test_the_oldest_answers_are_forwarded_first_and_dummies_last() -> None:
    schedule = scheduled("ada", "bo", num_micro_batches=3)
    window = schedule.windows[0]
    for index in (2, 1, 0):
        bring(schedule, index, State.READY)
    assert [mb.turn for mb in window.micro_batches.values()] == [3, 2, 1]
    order = []
    while (chosen := next_forward(window, 3)) is not None:
        schedule.forward(chosen)
        order.append(chosen.index)
    assert order == [1, 0, 2]


def test_no_more_than_the_limit_are_in_flight() -> None:
    schedule = scheduled("ada", "bo", "cy")
    window = schedule.windows[0]
    bring(schedule, 0, State.FORWARDED)
    bring(schedule, 1, State.GRADIENTS_READY)
    bring(schedule, 2, State.READY)
    assert next_forward(window, 2) is None
    assert index_of(next_forward(window, 3)) == 2


def test_blockers_are_whom_everything_in_flight_waits_for() -> None:
    schedule = scheduled("ada+bo", "bo+cy", "cy")
    flying = [bring(schedule, index, State.FORWARDED) for index in range(3)]
    assert blockers(flying[:1]) == {"ada", "bo"}
    assert blockers(flying[:2]) == {"bo"}
    assert blockers(flying) == blockers([]) == set()
    schedule.answer("bo", 0, "gradient")
    assert blockers(flying[:2]) == set()


def test_the_last_place_in_flight_is_kept_from_blockers_while_others_wait() -> None:
    schedule = scheduled("ada", "ada", "bo")
    window = schedule.windows[0]
    bring(schedule, 0, State.FORWARDED)
    bring(schedule, 1, State.READY)
    assert next_forward(window, 2) is None, "bo's is planned, and all would wait for ada"
    assert index_of(next_forward(window, 3)) == 1, "that is not the last place"
    bring(schedule, 2, State.READY)
    assert index_of(next_forward(window, 2)) == 2, "though 1 is older"
    bring(schedule, 2, State.DONE)
    assert index_of(next_forward(window, 2)) == 1, "nobody else is left"


def test_with_one_place_in_flight_blockers_may_have_it() -> None:
    schedule = scheduled("ada", "ada", "bo")
    bring(schedule, 0, State.READY)
    assert index_of(next_forward(schedule.windows[0], 1)) == 0


def test_the_oldest_gradients_are_backwarded_first() -> None:
    schedule = scheduled("ada", "bo", "cy")
    window = schedule.windows[0]
    for index, state in ((0, State.FORWARDED), (2, State.GRADIENTS_READY), (1, State.GRADIENTS_READY)):
        bring(schedule, index, state)
    assert index_of(next_backward(window, is_fixed=False)) == 2
    assert next_backward(window, is_fixed=True) is None, "0 was opened first, and nothing overtakes it"
    bring(schedule, 0, State.GRADIENTS_READY)
    assert index_of(next_backward(window, is_fixed=True)) == 0


def test_a_fixed_order_forwards_by_the_plan_and_lockstep_alone_by_arrival() -> None:
    schedule = scheduled("ada", "bo")
    window = schedule.windows[0]
    bring(schedule, 0, State.OPEN)
    bring(schedule, 1, State.READY)
    assert next_lockstep_forward(window, is_fixed=True) is None
    assert index_of(next_lockstep_forward(window, is_fixed=False)) == 1
    bring(schedule, 0, State.READY)
    assert index_of(next_lockstep_forward(window, is_fixed=True)) == 0


def test_forwards_go_before_backwards_but_dummies_after_both() -> None:
    schedule = scheduled("ada", "bo", num_micro_batches=3)
    window = schedule.windows[0]
    bring(schedule, 0, State.GRADIENTS_READY)
    bring(schedule, 1, State.READY)
    bring(schedule, 2, State.READY)
    assert index_of(next_to_compute(window, 2, is_fixed=False, due=None)) == 1
    assert index_of(next_to_compute(window, 1, is_fixed=False, due=None)) == 0, "no room for a forward"
    bring(schedule, 1, State.FORWARDED)
    assert index_of(next_to_compute(window, 3, is_fixed=False, due=None)) == 0, "rather than forward the dummy"
    bring(schedule, 0, State.DONE)
    assert index_of(next_to_compute(window, 3, is_fixed=False, due=None)) == 2


def test_in_lockstep_only_the_operation_that_is_due_may_go() -> None:
    schedule = scheduled("ada", "bo")
    window = schedule.windows[0]
    bring(schedule, 0, State.GRADIENTS_READY)
    assert next_to_compute(window, 2, is_fixed=False, due=Forward) is None
    assert index_of(next_to_compute(window, 2, is_fixed=False, due=Backward)) == 0
    bring(schedule, 1, State.READY)
    assert index_of(next_to_compute(window, 2, is_fixed=False, due=Forward)) == 1


def test_the_pattern_fills_then_alternates_then_drains() -> None:
    f, b = Forward, Backward
    assert lockstep_pattern(4, 2) == [f, f, b, f, b, f, b, b]
    assert lockstep_pattern(2, 5) == [f, f, b, b]
    assert lockstep_pattern(3, 1) == [f, b, f, b, f, b]
    for length in range(1, 6):
        for in_flight in range(1, 8):
            pattern = lockstep_pattern(length, in_flight)
            assert pattern.count(f) == pattern.count(b) == length
