"""Time for the steps on a card: all of it is given, none twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.card.parts import PARTS
from benchmarks.card.steps import LEAST_SECONDS, STEPS, allowance


def test_every_step_has_a_program() -> None:
    assert [step.name for step in STEPS] == list(PARTS)


@given(st.floats(0.0, 2000.0), st.lists(st.floats(0.0, 1.0), min_size=len(STEPS), max_size=len(STEPS)))
def test_steps_that_keep_to_their_time_end_in_time(seconds: float, used: list[float]) -> None:
    left = seconds
    for number, share in enumerate(used):
        given_to_it = allowance(STEPS[number:], left)
        assert 0.0 <= given_to_it <= left
        assert given_to_it >= min(left, LEAST_SECONDS)
        left -= share * given_to_it
    assert left >= 0.0


def test_the_last_step_may_take_all_that_is_left() -> None:
    assert allowance(STEPS[-1:], 333.0) == 333.0
