"""A client's bookkeeping of windows: what may be sent, when a window is trained and applied, what
is missed.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbert_ds.client.window_state import WindowState
from fedbert_ds.config import FederationSection, WireSection
from fedbert_ds.errors import WireError
from fedbert_ds.federation.strategy import strategy_of


def state_of(staleness: int = 0, first_window: int = 0, **federation: Any) -> WindowState[str, str]:
    strategy = strategy_of(FederationSection(**federation), WireSection())
    return WindowState(strategy, staleness, first_window)


def planned(state: WindowState[str, str], window: int, *micro_batches: int) -> None:
    state.announce(window, f"window {window}")
    state.plan(window, {number: f"piece {number}" for number in micro_batches})


def test_a_window_from_its_manifest_to_its_step() -> None:
    state = state_of()
    planned(state, 0, 10, 11)
    assert state.content(0) == "window 0" and state.piece(0, 11) == "piece 11"
    assert state.take_sendable() == []
    state.open(0, 11)
    state.open(0, 10)
    assert state.take_sendable() == [(0, 11), (0, 10)], "in the order of credit"
    assert state.take_sendable() == [], "each once"
    assert not state.finish(0, 10)
    assert state.finish(0, 11)
    assert state.applied == 0 and state.content(0) == "window 0", "trained, not applied"
    state.apply(0)
    assert state.applied == 1
    with pytest.raises(WireError, match="window 0, which this client has not under way"):
        state.content(0)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_credit_waits_until_the_half_is_recent_enough(staleness: int) -> None:
    state = state_of(staleness, first_window=5)
    for window in range(5, 9):
        planned(state, window, window)
        state.open(window, window)
    assert state.take_sendable() == [(window, window) for window in range(5, 6 + staleness)]
    state.finish(5, 5)
    assert state.take_sendable() == [], "trained is not applied"
    state.apply(5)
    assert state.take_sendable() == [(6 + staleness, 6 + staleness)]


def test_windows_applied_out_of_order_count_when_the_gap_closes() -> None:
    state = state_of()
    for window in (1, 2, 0):
        assert state.applied == 0
        state.apply(window)
    assert state.applied == 3
    state.apply(1)
    assert state.applied == 3


def test_skipped_pieces_lose_their_credit_and_can_finish_a_window() -> None:
    state = state_of()
    planned(state, 0, 10, 11, 12)
    for micro_batch in (10, 11):
        state.open(0, micro_batch)
    assert not state.skip(0, [10])
    assert state.take_sendable() == [(0, 11)]
    assert not state.skip(0, [12, 12])
    assert state.finish(0, 11)


def test_a_window_is_finished_once() -> None:
    state = state_of()
    planned(state, 0, 10, 11)
    assert not state.skip(0, [10, 99])
    assert state.skip(0, [10, 11])
    assert not state.skip(0, [10, 11]), "all done before"
    assert not state.skip(0, [])
    assert not state.skip(7, [10]), "a window that is over"


def test_missed_windows_wait_for_their_exchange_alone() -> None:
    summed = state_of(mode="synchronous")
    summed.miss(0, 3)
    assert summed.applied == 0
    for window in (1, 0, 2):
        summed.apply(window)
    assert summed.applied == 3
    rarely = state_of(mode="parallel", average_every=2)
    rarely.miss(0, 4)
    assert rarely.applied == 1, "the average after window 1 is on its way"
    rarely.apply(1)
    assert rarely.applied == 3


def test_an_update_that_came_before_its_window_was_missed_counts() -> None:
    state = state_of(mode="parallel", average_every=2)
    state.apply(1)
    state.miss(0, 2)
    assert state.applied == 2


def test_a_missed_window_that_was_announced_is_over() -> None:
    state = state_of(mode="parallel", average_every=10)
    state.announce(0, "window 0")
    state.announce(3, "window 3")
    state.miss(0, 3)
    assert state.applied == 3 and state.content(3) == "window 3"
    with pytest.raises(WireError, match="window 0, which this client has not under way"):
        state.content(0)


def test_a_client_that_joins_late_misses_from_its_first_window() -> None:
    """It begins with the reference of window 4, and the next window that it can announce is 6."""
    summed = state_of(first_window=4)
    summed.miss(4, 6)
    assert summed.applied == 4, "the sums of 4 and 5 are on their way"
    summed.apply(4)
    summed.apply(5)
    assert summed.applied == 6
    rarely = state_of(first_window=4, mode="parallel", average_every=10)
    rarely.miss(4, 6)
    assert rarely.applied == 6


def test_what_the_server_may_not_ask_for_is_one_line() -> None:
    state = state_of()
    for asked in (
        lambda: state.open(0, 10),
        lambda: state.finish(0, 10),
        lambda: state.piece(0, 10),
        lambda: state.plan(0, {}),
        lambda: state.content(0),
    ):
        with pytest.raises(WireError, match="window 0, which this client has not under way"):
            asked()
    planned(state, 0, 10)
    for asked in (lambda: state.open(0, 11), lambda: state.finish(0, 11), lambda: state.piece(0, 11)):
        with pytest.raises(WireError, match="asks for micro-batch 11, in which this client has no piece"):
            asked()
    state.skip(0, [10])
    with pytest.raises(WireError, match="asks for micro-batch 10"):
        state.open(0, 10)


@settings(max_examples=200)
@given(data=st.data())
def test_any_course_of_windows_sends_each_open_piece_once_and_in_time(data: st.DataObject) -> None:
    """Windows are planned ahead, pieces opened, skipped and finished, updates delayed, windows
    missed, in any order.
    """
    staleness = data.draw(st.integers(0, 2), label="staleness")
    federation: dict[str, Any] = data.draw(
        st.sampled_from([{"mode": "synchronous"}, *({"mode": "parallel", "average_every": n} for n in (1, 2, 5))])
    )
    strategy = strategy_of(FederationSection(**federation), WireSection())
    state: WindowState[int, str] = WindowState(strategy, staleness)
    num_windows = data.draw(st.integers(1, 6), label="windows")
    next_window = 0
    pending: dict[int, set[int]] = {}
    opened: set[tuple[int, int]] = set()
    sent: list[tuple[int, int]] = []
    skipped: set[tuple[int, int]] = set()
    updates: set[int] = set()
    """Windows whose combined update is on its way."""
    applied: set[int] = set()
    """By the definition."""

    def trained(window: int) -> None:
        if strategy.exchange_after(window) == "nothing":
            applied.add(window)
            state.apply(window)
        else:
            updates.add(window)

    while len(applied) < num_windows:
        events: list[tuple[Any, ...]] = [("update", window) for window in sorted(updates)]
        if next_window < num_windows and len(pending) < 3:
            events += [("plan",), ("miss",)]
        for window, pieces in pending.items():
            for piece in sorted(pieces):
                place = window, piece
                events += [("skip", *place)]
                events += [("finish", *place)] if place in sent else []
                events += [("open", *place)] if place not in opened else []
        match data.draw(st.sampled_from(events)):
            case ("plan",):
                numbers = {10 * next_window + n for n in range(data.draw(st.integers(1, 3)))}
                state.announce(next_window, next_window)
                state.plan(next_window, {number: "" for number in numbers})
                pending[next_window] = numbers
                next_window += 1
            case ("miss",):
                last = data.draw(st.integers(next_window + 1, num_windows))
                state.announce(next_window, next_window)
                for window in range(next_window, last):
                    if strategy.exchange_after(window) == "nothing":
                        applied.add(window)
                    else:
                        updates.add(window)
                state.miss(next_window, last)
                next_window = last
            case ("update", window):
                updates.remove(window)
                applied.add(window)
                state.apply(window)
            case ("open", window, piece):
                state.open(window, piece)
                opened.add((window, piece))
            case (kind, window, piece):
                pending[window].remove(piece)
                is_last = not pending[window]
                if kind == "skip":
                    skipped.add((window, piece))
                    assert state.skip(window, [piece]) == is_last
                else:
                    assert state.finish(window, piece) == is_last
                if is_last:
                    del pending[window]
                    trained(window)
        first = next(window for window in range(num_windows + 1) if window not in applied)
        assert state.applied == first
        ready = {place for place in opened - skipped - set(sent) if place[0] <= first + staleness}
        sendable = state.take_sendable()
        assert len(sendable) == len(ready) and set(sendable) == ready
        sent += sendable
    assert state.applied == num_windows and state.take_sendable() == []
