"""Deadlines: none while little is known, then from median and spread, and never below the floor."""

from __future__ import annotations

import math

from fedbert_ds.server.queue.deadlines import FEW, MEMORY, MULTIPLE, SPREADS, AnswerTimes


def taught(times: AnswerTimes, client: str, *seconds: float) -> AnswerTimes:
    for one in seconds:
        times.learn(client, "gradient", one)
    return times


def test_nothing_is_expected_of_whom_little_is_known() -> None:
    times = taught(AnswerTimes(floor=1.0), "ada", *[5.0] * (FEW - 1))
    assert times.deadline("ada") == math.inf and times.deadline("nobody") == math.inf
    assert taught(times, "ada", 5.0).deadline("ada") < math.inf
    assert times.deadline("bo") == math.inf, "each client is known for itself"


def test_a_deadline_by_hand() -> None:
    times = taught(AnswerTimes(floor=1.0), "ada", 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0)
    assert times.deadline("ada") == MULTIPLE * (2.5 + SPREADS * 1.0)  # distances 0.5 and 1.5, four of each


def test_no_deadline_is_below_the_floor() -> None:
    assert taught(AnswerTimes(floor=30.0), "ada", *[0.01] * 20).deadline("ada") == 30.0
    assert AnswerTimes().floor >= 30.0


def test_one_stall_moves_a_deadline_little_and_habits_are_unlearned() -> None:
    times = taught(AnswerTimes(floor=0.1), "ada", *[1.0, 1.1, 0.9] * 10)
    before = times.deadline("ada")
    assert taught(times, "ada", 1000.0).deadline("ada") < 1.5 * before
    assert taught(times, "ada", *[10.0] * MEMORY).deadline("ada") == MULTIPLE * 10.0


def test_the_farthest_is_the_quickest_answer_of_nearly_the_farthest_client() -> None:
    times = AnswerTimes()
    assert times.farthest("gradient") == 0.0
    for number in range(10):
        taught(times, f"c{number}", 50.0, float(number + 1))
    assert times.farthest("gradient") == 9.0
    assert times.farthest("activations") == 0.0
