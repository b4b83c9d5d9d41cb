"""A rank's planned windows: states of micro-batches, and what is left when a client is dropped."""

from __future__ import annotations

import pytest
from unit.server.queue.by_hand import bring, pieces, scheduled

from fedbert_ds.errors import WireError
from fedbert_ds.server.queue.packing import MicroBatch
from fedbert_ds.server.queue.schedule import Schedule, State


def test_a_micro_batch_goes_through_its_states() -> None:
    schedule = scheduled("ada+bo")
    window = schedule.windows[0]
    micro_batch = window.micro_batches[0]
    assert schedule.open(window, micro_batch) == pieces("ada", "bo") and micro_batch.state is State.OPEN
    assert schedule.answer("bo", 0, "activations") == pieces("bo")[0] and micro_batch.awaited == {"ada"}
    schedule.answer("ada", 0, "activations")
    assert micro_batch.state is State.READY and not window.in_flight
    assert schedule.forward(micro_batch) == pieces("ada", "bo") and window.in_flight == [micro_batch]
    schedule.answer("ada", 0, "gradient")
    schedule.answer("bo", 0, "gradient")
    assert micro_batch.state is State.GRADIENTS_READY and not window.is_done
    assert schedule.backward(micro_batch) == pieces("ada", "bo")
    assert window.is_done and not window.live


def test_what_counts_of_a_client_whatever_becomes_of_it() -> None:
    schedule = scheduled("ada+bo")
    window, micro_batch = schedule.windows[0], schedule.windows[0].micro_batches[0]
    bring(schedule, 0, State.FORWARDED)
    assert schedule.window_trained_by("ada") is None, "its gradient is not here"
    schedule.answer("ada", 0, "gradient")
    assert schedule.window_trained_by("ada") == window.number and schedule.window_trained_by("bo") is None
    schedule.drop("bo")
    schedule.backward(micro_batch)
    assert schedule.window_trained_by("ada") == window.number
    schedule.step()
    assert schedule.window_trained_by("ada") is None, "the window has ended"


def test_a_dummy_waits_for_nobody_and_holds_no_memory() -> None:
    schedule = scheduled("ada", num_micro_batches=2)
    dummy = bring(schedule, 1, State.READY)
    assert dummy.is_dummy and not dummy.holds_memory
    schedule.forward(dummy)
    assert dummy.state is State.GRADIENTS_READY and not dummy.holds_memory


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        (State.PLANNED, "activations"),
        (State.READY, "activations"),
        (State.OPEN, "gradient"),
        (State.DONE, "gradient"),
    ],
)
def test_an_answer_that_nobody_asked_for_is_refused(state: State, kind) -> None:
    schedule = scheduled("ada", "bo")
    bring(schedule, 0, state)
    for client, index in (("ada", 0), ("bo", 0), ("ada", 99)):
        with pytest.raises(WireError, match=f"{kind} of micro-batch {index}, which nobody asked for"):
            schedule.answer(client, index, kind)


def test_indices_go_on_from_window_to_window_and_dummies_come_after_what_is_planned() -> None:
    schedule = Schedule()
    assert schedule.plan(4, [pieces("ada"), pieces("bo")]) == (
        MicroBatch(0, pieces("ada")),
        MicroBatch(1, pieces("bo")),
    )
    assert [micro_batch.index for micro_batch in schedule.plan(5, [pieces("ada")])] == [2]
    assert list(schedule.start(3).micro_batches) == [0, 1, 3]
    assert [schedule.window_of(index) for index in range(5)] == [4, 4, 5, 4, None]


def test_a_schedule_says_what_starts_next() -> None:
    schedule = Schedule()
    assert not schedule.is_planned and not schedule.participants
    assert (schedule.num_micro_batches, schedule.masked_tokens) == (0, 0)
    schedule.plan(0, [pieces("ada", "bo"), pieces("ada")])
    assert schedule.is_planned and schedule.participants == {"ada", "bo"}
    assert (schedule.num_micro_batches, schedule.masked_tokens) == (2, 6)
    schedule.start(2)
    assert not schedule.is_planned and schedule.participants == {"ada", "bo"}
    assert (schedule.num_micro_batches, schedule.masked_tokens) == (0, 0)
    assert schedule.step().number == 0
    assert not schedule.windows and schedule.window_of(0) is None


def test_a_window_starts_once_and_only_when_it_is_planned() -> None:
    schedule = Schedule()
    with pytest.raises(RuntimeError, match="not planned"):
        schedule.start(1)
    schedule.plan(0, [])
    schedule.start(1)
    with pytest.raises(RuntimeError, match="has not stepped"):
        schedule.start(1)


@pytest.mark.parametrize(
    ("state", "skipped", "left", "after"),
    [
        (State.PLANNED, ((0, 0),), ["ada"], State.PLANNED),
        (State.OPEN, ((0, 0),), ["ada"], State.OPEN),
        (State.READY, ((0, 0),), ["ada"], State.READY),
        (State.FORWARDED, ((0, 0),), ["ada"], State.FORWARDED),
        (State.GRADIENTS_READY, (), ["ada", "bo"], State.GRADIENTS_READY),  # its gradient is here, and counts
        (State.DONE, (), ["ada", "bo"], State.DONE),
    ],
)
def test_a_client_is_dropped_in_every_state(state: State, skipped, left: list[str], after: State) -> None:
    schedule = scheduled("ada+bo")
    micro_batch = bring(schedule, 0, state)
    assert schedule.drop("bo") == skipped
    assert list(micro_batch.pieces) == left and micro_batch.state is after
    assert schedule.windows[0].lost_masked_tokens == 2 * len(skipped)
    assert schedule.drop("bo") == (), "once"


@pytest.mark.parametrize(
    ("state", "kind", "after"),
    [(State.OPEN, "activations", State.READY), (State.FORWARDED, "gradient", State.GRADIENTS_READY)],
)
def test_a_micro_batch_goes_on_when_the_last_client_it_waited_for_is_dropped(state: State, kind, after: State) -> None:
    schedule = scheduled("ada+bo")
    micro_batch = bring(schedule, 0, state)
    schedule.answer("ada", 0, kind)
    schedule.drop("bo")
    assert micro_batch.state is after


def test_what_has_lost_all_its_clients_is_done_as_a_dummy_is_but_a_graph_holds_memory() -> None:
    schedule = scheduled("ada", "ada")
    window = schedule.windows[0]
    flying = bring(schedule, 0, State.FORWARDED)
    schedule.drop("ada")
    assert flying.state is State.GRADIENTS_READY and flying.holds_memory
    planned = window.micro_batches[1]
    assert not window.planned and list(window.empty) == [planned] and window.wants_credit
    assert schedule.open(window, planned) == () and planned.state is State.READY and not planned.holds_memory


def test_what_is_dropped_before_the_start_is_not_lost() -> None:
    schedule = scheduled("ada")
    schedule.plan(1, [pieces("ada")])
    assert schedule.drop("ada") == ((0, 0), (1, 1))
    assert [window.lost_masked_tokens for window in schedule.windows] == [2, 0]


@pytest.mark.parametrize("state", State)
def test_a_roll_back_forgets_windows_in_any_state_but_not_the_indices(state: State) -> None:
    schedule = scheduled("ada+bo", "ada", num_micro_batches=3)
    ahead = schedule.plan(1, [pieces("ada")])
    bring(schedule, 0, state)
    schedule.roll_back()
    assert not schedule.is_running and not schedule.is_planned and not schedule.participants
    assert list(schedule.live) == [] and schedule.drop("ada") == ()
    for index in (0, 1, 2, ahead[0].index):
        assert schedule.window_of(index) is None
        for kind in ("activations", "gradient"):
            with pytest.raises(WireError, match="nobody asked for"):
                schedule.answer("ada", index, kind)
    (again,) = schedule.plan(0, [pieces("ada")])
    assert again.index == 4, "answers to the forgotten ones must not fit"
    assert schedule.is_planned and schedule.start(1).lost_masked_tokens == 0
