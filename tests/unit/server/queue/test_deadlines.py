"""Who is late: answer times and their deadlines, then each rule for open questions alone."""

from __future__ import annotations

import math
import pickle
import sys

import pytest

from fedbert_ds.server.queue.deadlines import FEW, MEMORY, MULTIPLE, SPREADS, AnswerTimes, Deadlines, Late, Question

MANIFEST = Question("manifest")
GRADIENT = Question("gradient", 3)
ACTIVATIONS = Question("activations", 4)
SAVED = Question("saved", 7)


# -- answer times ----------------------------------------------------------------------------------


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


def test_a_forgotten_client_has_no_part_in_the_farthest() -> None:
    times = taught(taught(AnswerTimes(floor=1.0), "ada", *[9.0] * FEW), "bo", 2.0)
    assert times.farthest("gradient") == 2.0, "of two, the 90th percentile is the nearer one"
    times.forget("bo")
    assert times.farthest("gradient") == 9.0
    times.forget("ada")
    assert times.farthest("gradient") == 0.0 and times.deadline("ada") == math.inf


# -- silence ---------------------------------------------------------------------------------------


def test_a_client_is_gone_once_any_question_is_open_for_longer_than_the_silence_timeout() -> None:
    deadlines = Deadlines(silence_timeout=10.0)
    deadlines.ask("ada", SAVED, 100.0)
    assert deadlines.late(110.0) is None
    assert deadlines.late(math.nextafter(110.0, math.inf)) == Late("ada", is_gone=True)


def test_without_a_silence_timeout_nobody_is_late() -> None:
    deadlines = Deadlines()
    deadlines.ask("ada", GRADIENT, 0.0)
    assert deadlines.late(1e9) is None


@pytest.mark.parametrize("close", ["answered", "cancel"])
def test_a_closed_question_makes_nobody_late(close: str) -> None:
    deadlines = Deadlines(silence_timeout=10.0)
    deadlines.ask("ada", SAVED, 0.0)
    if close == "answered":
        deadlines.answered("ada", SAVED, 5.0)
    else:
        deadlines.cancel("ada", SAVED)
    assert deadlines.asked_at("ada", SAVED) is None
    assert deadlines.late(1000.0) is None


def test_the_oldest_open_question_counts() -> None:
    deadlines = Deadlines(silence_timeout=10.0)
    deadlines.ask("ada", SAVED, 0.0)
    deadlines.ask("ada", GRADIENT, 4.0)
    deadlines.answered("ada", SAVED, 6.0)
    assert deadlines.late(14.0) is None
    assert deadlines.late(14.5) == Late("ada", is_gone=True)


def test_a_question_asked_again_is_as_old_as_the_last_time() -> None:
    deadlines = Deadlines(silence_timeout=10.0)
    deadlines.ask("ada", SAVED, 0.0)
    deadlines.ask("ada", SAVED, 8.0)
    assert deadlines.asked_at("ada", SAVED) == 8.0
    assert deadlines.late(18.0) is None
    assert deadlines.late(18.5) == Late("ada", is_gone=True)


def test_each_part_of_a_long_answer_starts_its_clock_anew() -> None:
    deadlines = Deadlines(silence_timeout=10.0)
    update = Question("update", 2)
    deadlines.ask("ada", update, 0.0)
    deadlines.stop_clocks(1.0)
    for now in (9.0, 18.0, 27.0):
        assert deadlines.late(now) is None
        deadlines.progress("ada", update, now)
    assert deadlines.asked_at("ada", update) == 0.0, "it was asked once"
    assert deadlines.late(37.0) is None
    assert deadlines.late(37.5) == Late("ada", is_gone=True)


def test_progress_sets_a_clock_forward_by_what_it_deserves_and_never_beyond_now() -> None:
    deadlines = Deadlines(silence_timeout=10.0)
    update = Question("update", 2)
    deadlines.ask("ada", update, 0.0)
    for now in (1.0, 2.0, 3.0, 4.0):
        deadlines.progress("ada", update, now, seconds=0.5)  # 2 s together
    assert deadlines.late(12.0) is None
    deadlines.progress("ada", update, 12.0, seconds=100.0)
    assert deadlines.late(22.0) is None
    assert deadlines.late(22.5) == Late("ada", is_gone=True)


def test_an_answer_has_an_end_whatever_comes_of_it() -> None:
    deadlines = Deadlines(silence_timeout=10.0)
    deadlines.ask("ada", SAVED, 0.0)
    deadlines.ask("bo", SAVED, 0.0)
    late = []
    for second in range(200):
        deadlines.progress("ada", SAVED, float(second))
        if (client := deadlines.late(float(second))) is not None:
            late.append((client.client, second))
            deadlines.forget(client.client)
    assert late == [("bo", 11), ("ada", 101)], "each by its own clock"


def test_many_small_parts_take_no_memory() -> None:
    deadlines = Deadlines(silence_timeout=10.0)
    deadlines.ask("ada", SAVED, 0.0)
    before = sys.getsizeof(pickle.dumps(deadlines))
    for part in range(20_000):
        deadlines.progress("ada", SAVED, part / 10_000)
    assert sys.getsizeof(pickle.dumps(deadlines)) < before + 200


@pytest.mark.parametrize("num_open", [1, 1000])
def test_many_answered_questions_take_no_memory_and_the_open_ones_are_not_forgotten(num_open: int) -> None:
    deadlines = Deadlines(silence_timeout=10.0)
    for number in range(num_open):
        deadlines.ask(f"client {number}", GRADIENT, number / num_open)
    before = sys.getsizeof(pickle.dumps(deadlines))
    for number in range(20_000):
        deadlines.ask("ada", Question("activations", number), 1.0)
        deadlines.answered("ada", Question("activations", number), 1.0)
    assert sys.getsizeof(pickle.dumps(deadlines)) < 3 * before + 10_000
    late = []
    while (client := deadlines.late(11.1)) is not None:
        late.append(client.client)
        deadlines.forget(client.client)
    assert sorted(late) == sorted(f"client {number}" for number in range(num_open))


def test_in_a_hurry_everybody_has_the_same_few_seconds() -> None:
    deadlines = Deadlines(silence_timeout=300.0)
    deadlines.ask("ada", SAVED, 0.0)
    deadlines.ask("bo", GRADIENT, 90.0)
    deadlines.ask("cy", ACTIVATIONS, 90.0, is_due=False)
    for now in (100.0, 105.0):
        deadlines.hurry(10.0, now)
    assert deadlines.late(110.0) is None, "however long they had been silent"
    late = []
    while (client := deadlines.late(110.5)) is not None:
        late.append(client)
        deadlines.forget(client.client)
    assert late == [Late("ada", is_gone=True), Late("bo", is_gone=True)]
    deadlines.ask("dee", SAVED, 120.0)
    assert deadlines.late(130.0) is None and deadlines.late(130.5) == Late("dee", is_gone=True)


def test_a_hurry_gives_nobody_more_time() -> None:
    deadlines = Deadlines(silence_timeout=5.0)
    deadlines.ask("ada", SAVED, 0.0)
    deadlines.hurry(10.0, 4.0)
    assert deadlines.late(5.5) == Late("ada", is_gone=True) and not deadlines.is_hurried


def test_progress_of_a_question_that_is_not_open_opens_none() -> None:
    deadlines = Deadlines(silence_timeout=10.0)
    deadlines.progress("ada", SAVED, 0.0)
    assert deadlines.asked_at("ada", SAVED) is None
    assert deadlines.late(1000.0) is None


def test_clocks_stand_still_while_the_rank_is_busy() -> None:
    deadlines = Deadlines(silence_timeout=10.0)
    deadlines.ask("ada", SAVED, 0.0)
    deadlines.stop_clocks(100.0)
    deadlines.ask("bo", SAVED, 101.0)
    assert deadlines.late(110.0) is None
    assert deadlines.late(110.5) == Late("ada", is_gone=True)
    deadlines.forget("ada")
    assert deadlines.late(111.0) is None, "what was asked afterwards does not profit"
    assert deadlines.late(111.5) == Late("bo", is_gone=True)


def test_no_clock_runs_before_an_answer_is_due() -> None:
    deadlines = Deadlines(silence_timeout=10.0)
    deadlines.ask("ada", ACTIVATIONS, 0.0, is_due=False)
    assert deadlines.asked_at("ada", ACTIVATIONS) == 0.0
    assert deadlines.late(1000.0) is None
    deadlines.ask("ada", ACTIVATIONS, 1000.0)
    assert deadlines.late(1010.5) == Late("ada", is_gone=True)


def test_a_client_that_is_gone_owes_nothing_and_is_a_stranger_when_it_comes_back() -> None:
    deadlines = Deadlines(silence_timeout=10.0, answer_times=taught(AnswerTimes(floor=1.0), "ada", *[1.0] * FEW))
    deadlines.ask("ada", SAVED, 0.0)
    deadlines.forget("ada")
    assert deadlines.late(100.0) is None
    deadlines.answered("ada", SAVED, 100.0)
    deadlines.ask("ada", GRADIENT, 100.0)
    assert deadlines.late(109.0) is None, "its deadline is forgotten too"


def test_late_clients_come_one_by_one_in_the_order_of_names() -> None:
    deadlines = Deadlines(silence_timeout=10.0)
    for client in ("cy", "ada", "bo"):
        deadlines.ask(client, SAVED, 0.0)
    deadlines.answered("bo", SAVED, 1.0)
    found = []
    while (late := deadlines.late(11.0)) is not None:
        found.append(late.client)
        deadlines.forget(late.client)
    assert found == ["ada", "cy"]


# -- slow clients ----------------------------------------------------------------------------------


def with_deadline(seconds: float, *clients: str, silence_timeout: float = math.inf) -> Deadlines:
    """These clients answer at once and always: the floor is their deadline."""
    times = AnswerTimes(floor=seconds)
    for client in clients:
        taught(times, client, *[0.0] * FEW)
    return Deadlines(silence_timeout, times)


@pytest.mark.parametrize("question", [GRADIENT, ACTIVATIONS])
def test_a_client_is_slow_once_a_piece_takes_longer_than_its_deadline(question: Question) -> None:
    deadlines = with_deadline(5.0, "ada")
    deadlines.ask("ada", question, 0.0)
    deadlines.ask("bo", question, 0.0)
    assert deadlines.late(5.0) is None
    assert deadlines.late(5.5) == Late("ada", is_gone=False), "and nothing is known of bo"


def test_nobody_is_slow_with_what_is_no_piece() -> None:
    deadlines = with_deadline(5.0, "ada")
    for question in (MANIFEST, SAVED, Question("update", 1)):
        deadlines.ask("ada", question, 0.0)
    assert deadlines.late(1000.0) is None


def test_who_answered_another_piece_since_is_not_slow() -> None:
    """Answers come one after another."""
    deadlines = with_deadline(5.0, "ada")
    deadlines.ask("ada", GRADIENT, 0.0)
    deadlines.ask("ada", ACTIVATIONS, 0.0)
    deadlines.answered("ada", ACTIVATIONS, 4.0)
    assert deadlines.late(9.0) is None
    assert deadlines.late(9.5) == Late("ada", is_gone=False)


def test_an_answer_that_was_not_due_shows_that_a_client_is_there_but_teaches_nothing() -> None:
    deadlines = with_deadline(5.0, "ada")
    deadlines.ask("ada", GRADIENT, 0.0)
    deadlines.ask("ada", ACTIVATIONS, 0.0, is_due=False)
    deadlines.answered("ada", ACTIVATIONS, 4.0)
    assert deadlines.late(9.0) is None
    assert deadlines.answer_times is not None and deadlines.answer_times.farthest("activations") == 0.0


def test_answer_times_are_learned_by_the_callers_clock_and_of_pieces_alone() -> None:
    times = AnswerTimes()
    deadlines = Deadlines(answer_times=times)
    deadlines.ask("ada", GRADIENT, 10.0)
    deadlines.ask("ada", SAVED, 10.0)
    deadlines.stop_clocks(2.0)
    deadlines.answered("ada", GRADIENT, 13.0)
    deadlines.answered("ada", SAVED, 13.0)
    assert times.farthest("gradient") == 3.0, "what the rank was busy with is part of the round trip"
    assert times.farthest("saved") == 0.0


def test_a_client_that_is_slow_and_gone_is_gone() -> None:
    deadlines = with_deadline(5.0, "ada", silence_timeout=10.0)
    deadlines.ask("ada", GRADIENT, 0.0)
    assert deadlines.late(10.5) == Late("ada", is_gone=True)


def test_a_suspended_client_owes_no_piece_but_its_silence_goes_on() -> None:
    deadlines = with_deadline(5.0, "ada", silence_timeout=10.0)
    deadlines.ask("ada", GRADIENT, 0.0)
    deadlines.ask("ada", SAVED, 3.0)
    assert deadlines.late(5.5) == Late("ada", is_gone=False)
    deadlines.suspend("ada", MANIFEST)
    assert deadlines.asked_at("ada", GRADIENT) is None
    assert deadlines.asked_at("ada", SAVED) == 3.0, "a window cannot go on without this"
    assert deadlines.asked_at("ada", MANIFEST) == 0.0
    assert deadlines.late(10.0) is None
    assert deadlines.late(10.5) == Late("ada", is_gone=True)


def test_closed_questions_make_nobody_late_and_what_was_learned_stays() -> None:
    times = taught(AnswerTimes(floor=1.0), "ada", *[2.0] * FEW)
    deadlines = Deadlines(silence_timeout=100.0, answer_times=times)
    for question in (MANIFEST, GRADIENT, ACTIVATIONS, SAVED):
        deadlines.ask("ada", question, 0.0)
    assert deadlines.late(50.0) == Late("ada", is_gone=False)
    deadlines.close_all("ada")
    deadlines.close_all("nobody")
    assert deadlines.late(1000.0) is None
    assert all(deadlines.asked_at("ada", one) is None for one in (MANIFEST, GRADIENT, ACTIVATIONS, SAVED))
    assert times.deadline("ada") == MULTIPLE * 2.0
    deadlines.ask("ada", MANIFEST, 1000.0)
    assert deadlines.late(1100.0) is None, "its clock is a new one"
    assert deadlines.late(1100.5) == Late("ada", is_gone=True)
