"""The pipeline queue and its clients: lost at every moment, late, suspended and back, silent for
too long.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from unit.server.queue.by_hand import announce, decided, pieces, queue_of, started, trained
from unit.server.queue.federation import FixedAnswerTimes

from fedbert_ds.errors import WireError
from fedbert_ds.server.queue.deadlines import Deadlines, Question
from fedbert_ds.server.queue.decisions import Backward
from fedbert_ds.server.queue.pipeline_queue import PipelineQueue
from fedbert_ds.wire.messages import Manifest


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("opened", ["forward 0 ada", "backward 0 ada", "step 0 lost 2"]),
        ("activations", ["forward 0 ada", "backward 0 ada", "step 0 lost 2"]),
        ("forwarded", ["forward 0 ada+bo", "backward 0 ada", "step 0 lost 2"]),
        # A gradient that was here in time counts, and so do its masked tokens.
        ("gradient", ["forward 0 ada+bo", "backward 0 ada+bo", "step 0 lost 0"]),
    ],
)
def test_a_client_lost_at_every_moment(moment: str, expected: list[str]) -> None:
    queue = started(1, [pieces("ada", "bo")])
    assert decided(queue) == ["open 0"]
    words = []
    for event in ("opened", "activations", "forwarded", "gradient"):
        if event == "activations":
            queue.answer("bo", 0, "activations")
        elif event == "forwarded":
            queue.answer("ada", 0, "activations")
            words += decided(queue)
        elif event == "gradient":
            queue.answer("bo", 0, "gradient")
        if event == moment:
            break
    queue.lose("bo")
    if moment in ("opened", "activations"):
        queue.answer("ada", 0, "activations")
        words += decided(queue)
    queue.answer("ada", 0, "gradient")
    assert words + decided(queue) == expected


def test_lost_after_its_gradient_pieces_keep_their_order() -> None:
    queue = started(1, [pieces("ada", "bo")])
    decided(queue)
    queue.answer("ada", 0, "activations")
    queue.answer("bo", 0, "activations")
    decided(queue)
    queue.answer("ada", 0, "gradient")
    queue.lose("ada")
    queue.answer("bo", 0, "gradient")
    assert queue.decide(0.0) == Backward(0, pieces("ada", "bo"))


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
        "backward 1",
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
    assert trained(queue, "ada", 0) == ["forward 0 ada", "backward 0 ada", "step 0 lost 0"]


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
        queue.answer("bo", 0, "activations")
    assert trained(queue, "ada", 0) == ["forward 0 ada", "backward 0 ada", "step 0 lost 0"]


# -- late clients ----------------------------------------------------------------------------------


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
    queue.answer("ada", 0, "activations")
    assert decided(queue, 5.0) == ["forward 0 ada"]
    queue.answer("ada", 0, "gradient")
    return queue


def test_a_window_goes_on_without_a_late_client_and_it_comes_back() -> None:
    queue = late_bo()
    assert decided(queue, 5.5) == [
        "suspend bo ((0, 1), (1, 3))",  # of both windows
        "forward 1",
        "backward 0 ada",
        "backward 1",
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
    assert queue.roster.next_window == 3
    announce(queue, "ada", "bo")
    assert trained(queue, "ada", 2, 7.0)[-4:] == ["step 1 lost 0", "plan 3 ada+bo", "open 5", "open 6"]
    queue.start(1, 8.0)
    assert trained(queue, "ada", 4, 8.0)[-1] == "step 2 lost 0"
    queue.start(2, 9.0)
    assert trained(queue, "ada", 5, 9.0)[-1] == "backward 5 ada"
    assert trained(queue, "bo", 6, 9.0)[-1] == "step 3 lost 0"


def test_a_late_client_that_gave_its_manifest_is_told_that_the_plan_leaves_it_out() -> None:
    queue = late_bo()
    assert decided(queue, 5.5)[-1] == "step 0 lost 2"
    announce(queue, "ada", "bo")  # without `reactivate`: it came before bo was late
    assert decided(queue, 5.5) == ["plan 2 ada without bo", "open 4"]


def test_a_plan_without_a_late_client_does_not_end_its_silence() -> None:
    queue = late_bo(silence_timeout=10.0)
    announce(queue, "bo")
    assert decided(queue, 5.5)[0] == "suspend bo ((0, 1), (1, 3))"
    announce(queue, "ada")
    assert decided(queue, 5.5) == ["plan 2 ada without bo", "open 4"]
    assert "expire bo" not in decided(queue, 10.0)
    assert decided(queue, 10.5)[0] == "expire bo"


def test_a_gradient_in_time_counts_though_its_client_is_late_then() -> None:
    queue = started(2, [pieces("ada", "bo"), pieces("bo")], deadlines=Deadlines(answer_times=FixedAnswerTimes(5.0)))
    decided(queue)
    queue.answer("ada", 0, "activations")
    queue.answer("bo", 0, "activations")
    assert decided(queue, 1.0) == ["forward 0 ada+bo"]
    queue.answer("bo", 0, "gradient")
    assert decided(queue, 1.0) == []
    queue.answer("ada", 0, "gradient")
    assert decided(queue, 5.5) == ["backward 0 ada+bo"], "who has answered something since is not late"
    assert decided(queue, 6.5) == ["suspend bo ((0, 1),)", "forward 1", "backward 1", "step 0 lost 2"]


@pytest.mark.parametrize("is_alone", [True, False])
def test_when_everybody_is_late_no_window_begins_unless_other_ranks_have_somebody(is_alone: bool) -> None:
    """A network that is down for a minute must not use up the run's windows."""
    queue = queue_of(1, [[pieces("ada")]] * 5, deadlines=Deadlines(60.0, FixedAnswerTimes(5.0)))
    queue.join("ada", 0.0)
    announce(queue, "ada")
    assert decided(queue) == ["plan 0 ada", "open 0"]
    queue.start(1, 0.0, elsewhere=frozenset() if is_alone else frozenset({"cy"}))
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


# -- silence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("owed", ["manifest", "activations", "gradient"])
def test_silence_is_measured_from_the_question(owed: str) -> None:
    """A client expires once it has owed one answer for longer than the timeout, whatever it owed
    before.
    """
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
        queue.answer("ada", 0, "activations")
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
    queue.answer("ada", 0, "activations")
    assert decided(queue, 6.0) == ["forward 0 ada"]
    queue.answer("ada", 0, "gradient")
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


# -- windows that only some take part in -----------------------------------------------------------


def by_turns(client: str, window: int) -> bool:
    return client == ("ada", "bo")[window % 2]


def of_turns(**options: Any) -> PipelineQueue:
    """ada trains in windows 0 and 2, bo in 1 and 3; both are here, and announced their first."""
    plans = [[pieces("ada")], [pieces("bo")]] * 2
    queue = queue_of(1, plans, takes_part=by_turns, **options)
    for number, client in enumerate(("ada", "bo")):
        queue.join(client, 0.0)
        queue.manifest(Manifest(client, number, (4,), (2,)))
    return queue


def test_windows_of_turns_follow_one_another() -> None:
    queue = of_turns()
    assert decided(queue) == ["plan 0 ada", "plan 1 bo", "open 0", "open 1"], "the next one is planned ahead"
    queue.start(1, 0.0)
    assert trained(queue, "ada", 0) == ["forward 0 ada", "backward 0 ada", "step 0 lost 0"]
    assert queue.roster.next_window_of("ada") == 2 and queue.roster.next_window_of("bo") == 3
    queue.start(1, 0.0)
    queue.manifest(Manifest("bo", 3, (4,), (2,)))
    queue.manifest(Manifest("ada", 2, (4,), (2,)))
    assert trained(queue, "bo", 1)[:2] == ["plan 2 ada", "open 2"]


def test_no_clock_runs_for_a_client_that_is_not_asked_for_anything() -> None:
    """bo waits for its window, however long ada's take, or how early it announced."""
    plans = [[pieces("ada")]] * 3 + [[pieces("bo")]]
    queue = queue_of(
        1, plans, takes_part=lambda client, window: (client == "bo") == (window == 3), deadlines=Deadlines(10.0)
    )
    queue.join("ada", 0.0)
    queue.join("bo", 0.0)
    queue.manifest(Manifest("bo", 3, (4,), (2,)))
    for window in range(3):
        now = 30.0 * window
        if window == 0:
            queue.manifest(Manifest("ada", 0, (4,), (2,)))
            assert decided(queue, now) == ["plan 0 ada", "open 0"]
        queue.start(1, now)
        if window < 2:
            queue.manifest(Manifest("ada", window + 1, (4,), (2,)))
        assert f"step {window} lost 0" in trained(queue, "ada", window, now + 9.0)
        assert queue.clients == {"ada", "bo"}
    queue.start(1, 90.0)
    assert trained(queue, "bo", 3, 99.0)[-1] == "step 3 lost 0"


def test_the_clock_of_a_manifest_begins_when_its_window_is_next() -> None:
    queue = queue_of(1, [[pieces("ada")], [pieces("bo")]] * 2, takes_part=by_turns, deadlines=Deadlines(10.0))
    queue.join("ada", 0.0)
    queue.join("bo", 0.0)
    assert queue.deadlines.asked_at("ada", Question("manifest")) == 0.0
    assert queue.deadlines.asked_at("bo", Question("manifest")) is None
    queue.manifest(Manifest("ada", 0, (4,), (2,)))
    assert decided(queue, 50.0) == ["plan 0 ada", "open 0"], "bo is asked now"
    assert queue.deadlines.asked_at("bo", Question("manifest")) == 50.0
    assert queue.deadlines.asked_at("ada", Question("manifest")) is None
    assert decided(queue, 60.0) == []
    assert decided(queue, 60.5)[0] == "expire bo"


def test_a_late_client_is_asked_for_nothing_until_its_next_window() -> None:
    """ada is suspended in window 0, and windows 1 and 2 are bo's: its silence counts from window
    3's turn on.
    """
    plans = [[pieces("ada")], [pieces("bo")], [pieces("bo")], [pieces("ada")]]
    queue = queue_of(
        1, plans, takes_part=lambda client, window: (client == "bo") == (window in (1, 2)),
        deadlines=Deadlines(20.0, FixedAnswerTimes(5.0)),
    )  # fmt: skip
    queue.join("ada", 0.0)
    queue.join("bo", 0.0)
    queue.manifest(Manifest("ada", 0, (4,), (2,)))
    assert decided(queue) == ["plan 0 ada", "open 0"]
    queue.start(1, 0.0)
    assert decided(queue, 5.5)[0] == "suspend ada ((0, 0),)"
    assert queue.deadlines.asked_at("ada", Question("manifest")) is None
    queue.manifest(Manifest("bo", 1, (4,), (2,)))
    assert decided(queue, 15.0) == ["plan 1 bo", "open 1"]
    queue.start(1, 15.0, elsewhere=frozenset())
    queue.manifest(Manifest("bo", 2, (4,), (2,)))
    assert decided(queue, 15.5) == ["plan 2 bo", "open 2"], "window 3 is next, and ada is asked for it"
    assert queue.deadlines.asked_at("ada", Question("manifest")) == 15.5
    assert "step 1 lost 0" in trained(queue, "bo", 1, 16.0)
    queue.start(1, 30.0, elsewhere=frozenset())
    assert trained(queue, "bo", 2, 31.0)[-1].startswith("step 2") and queue.clients == {"ada", "bo"}
    assert decided(queue, 36.0)[0] == "expire ada"


@pytest.mark.parametrize("lockstep_forwards", [False, True])
def test_a_rank_without_participants_runs_a_window_with_dummies(lockstep_forwards: bool) -> None:
    queue = queue_of(
        1, [[], [pieces("bo")]], takes_part=by_turns, lockstep_forwards=lockstep_forwards, deadlines=Deadlines(10.0)
    )
    queue.join("bo", 0.0)
    assert decided(queue) == ["plan 0"], "nobody is waited for"
    assert queue.schedule.is_planned and queue.schedule.num_micro_batches == 0
    queue.start(2, 0.0, elsewhere=frozenset({"ada"}))
    words = decided(queue, 5.0)
    assert [word for word in words if word.startswith(("forward", "backward", "step"))] in (
        ["forward 0", "backward 0", "forward 1", "backward 1", "step 0 lost 0"],
        ["forward 0", "forward 1", "backward 0", "backward 1", "step 0 lost 0"],
    )
    queue.manifest(Manifest("bo", 1, (4,), (2,)))
    assert decided(queue, 5.0)[0] == "plan 1 bo"


def test_a_window_whose_participants_are_lost_is_empty_and_the_run_goes_on() -> None:
    queue = of_turns()
    queue.lose("ada")
    assert decided(queue)[:2] == ["plan 0", "plan 1 bo"]
    queue.start(1, 0.0, elsewhere=frozenset())
    assert queue.schedule.participants == frozenset()
    assert "step 0 lost 0" in decided(queue)
    queue.start(1, 0.0, elsewhere=frozenset())
    assert trained(queue, "bo", 0)[-1] == "step 1 lost 0"


def test_a_window_of_suspended_participants_waits_unless_another_rank_has_one() -> None:
    for elsewhere, is_planned in ((frozenset(), False), (frozenset({"cy"}), False), (frozenset({"di"}), True)):
        queue = queue_of(
            1, [[pieces("ada")], [pieces("ada")]], deadlines=Deadlines(60.0, FixedAnswerTimes(5.0)),
            takes_part=lambda client, window: client in ("ada", "di"),
        )  # fmt: skip
        queue.join("ada", 0.0)
        announce(queue, "ada")
        assert decided(queue) == ["plan 0 ada", "open 0"]
        queue.start(1, 0.0, elsewhere=elsewhere)
        words = decided(queue, 5.5)
        assert words[0] == "suspend ada ((0, 0),)"
        assert ("plan 1" in words) == is_planned, elsewhere


# -- clients that come while windows run, and windows that are undone ------------------------------


def test_windows_do_not_wait_for_a_newcomer_until_it_has_announced() -> None:
    queue = queue_of(1, [[pieces("ada")], [pieces("ada")], [pieces("ada", "bo")]])
    queue.join("ada", 0.0)
    announce(queue, "ada")
    assert decided(queue) == ["plan 0 ada", "open 0"]
    queue.join("bo", 0.0, is_awaited=False)
    announce(queue, "ada")
    queue.start(1, 0.0)
    assert decided(queue)[0] == "plan 1 ada"
    queue.reactivate("bo", 1.0)
    assert queue.manifest(Manifest("bo", 1, (4,), (2,))) is False, "it must be told which window is next"
    assert "step 0 lost 0" in trained(queue, "ada", 0)
    announce(queue, "ada")
    assert decided(queue) == []
    announce(queue, "bo")
    queue.start(1, 0.0)
    assert decided(queue)[0] == "plan 2 ada+bo"


def test_a_newcomer_that_never_answers_expires() -> None:
    queue = queue_of(1, [[pieces("ada")]] * 2, deadlines=Deadlines(silence_timeout=10.0))
    queue.join("ada", 0.0)
    queue.join("bo", 0.0, is_awaited=False)
    announce(queue, "ada")
    assert decided(queue, 9.0) == ["plan 0 ada", "open 0"]
    announce(queue, "ada")
    assert "expire bo" in decided(queue, 10.5)


def test_while_it_is_held_a_queue_plans_nothing() -> None:
    queue = queue_of(1, [[pieces("ada")]] * 2)
    queue.join("ada", 0.0)
    queue.hold(True)
    announce(queue, "ada")
    assert decided(queue) == [] and not queue.schedule.is_planned
    queue.hold(False)
    assert decided(queue) == ["plan 0 ada", "open 0"]


MOMENTS = ["announced", "planned", "started", "activations", "all activations", "gradient", "all gradients", "stepped"]


@pytest.mark.parametrize("is_planned_ahead", [False, True])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_window_is_undone_at_every_moment(moment: str, is_planned_ahead: bool) -> None:
    plan = [pieces("ada", "bo")]
    queue = queue_of(1, [plan] * 4, num_windows=2)
    for client in ("ada", "bo"):
        queue.join(client, 0.0)
    announce(queue, "ada", "bo")
    for event in MOMENTS[1 : MOMENTS.index(moment) + 1]:
        match event:
            case "planned":
                assert decided(queue)[0] == "plan 0 ada+bo"
                if is_planned_ahead:
                    announce(queue, "ada", "bo")
                    assert decided(queue)[0] == "plan 1 ada+bo"
            case "started":
                queue.start(1, 0.0)
            case "activations" | "gradient":
                queue.answer("ada", 0, event)
            case "all activations":
                queue.answer("bo", 0, "activations")
                assert "forward 0 ada+bo" in decided(queue)
            case "all gradients":
                queue.answer("bo", 0, "gradient")
            case "stepped":
                assert decided(queue)[-1] == "step 0 lost 0"
    queue.roll_back(0, 7.0)
    assert decided(queue, 7.0) == [] and queue.roster.next_window == 0
    for client in ("ada", "bo"):
        assert queue.deadlines.asked_at(client, Question("manifest")) == 7.0
        for index in range(2):
            for kind in ("activations", "gradient"):
                with pytest.raises(WireError, match="nobody asked for"):
                    queue.answer(client, index, kind)
    announce(queue, "ada", "bo")
    first = next(words for words in decided(queue, 7.0) if words.startswith("open"))
    index = int(first.removeprefix("open "))
    assert index == {True: 2, False: 1}[is_planned_ahead] * (moment != "announced"), "indices go on"
    queue.start(1, 7.0)
    queue.answer("ada", index, "activations")
    assert f"forward {index} ada+bo" in trained(queue, "bo", index, 7.0)
    queue.answer("ada", index, "gradient")
    assert decided(queue, 7.0)[:2] == [f"backward {index} ada+bo", "step 0 lost 0"]


def test_whoever_was_late_or_skipped_before_a_roll_back_is_awaited_after_it() -> None:
    queue = late_bo()
    assert decided(queue, 5.5)[0] == "suspend bo ((0, 1), (1, 3))"
    queue.roll_back(0, 6.0)
    assert queue.active == {"ada", "bo"} and not queue.was_skipped("bo", 1)
    announce(queue, "ada")
    assert decided(queue, 6.0) == [], "bo is waited for"
