"""Steps in processes of their own: none stops another, and what one has told is kept."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.card.runner import Outcome, run_step, run_steps
from benchmarks.card.steps import Step

STEPS = [Step("good", "", 1), Step("bad", "", 1), Step("late", "", 1)]
PROGRAMS = {
    "good": "print('a line of a library'); print('{\"n\": 1}')",
    "bad": "print('{\"n\": 2}', flush=True); raise ValueError('no such kernel')",
    "late": "print('{\"n\": 3}', flush=True); import time; time.sleep(600)",
}


def test_what_a_step_has_told_is_kept_however_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.card.steps.LEAST_SECONDS", 8.0)
    outcomes: list[Outcome] = []
    run_steps(STEPS, 25.0, outcomes.append, lambda step: [sys.executable, "-c", PROGRAMS[step.name]])
    assert [(each.step, each.rows) for each in outcomes] == [(n, [{"n": i}]) for i, n in enumerate(PROGRAMS, 1)]
    good, bad, late = (each.ended for each in outcomes)
    assert good == "done" and bad == "failed: ValueError: no such kernel" and late.startswith("stopped after")


def test_a_step_for_which_no_time_is_left_is_said() -> None:
    outcomes: list[Outcome] = []
    run_steps(STEPS[:2], -1.0, outcomes.append, lambda step: pytest.fail("it may not start"))
    assert [each.ended for each in outcomes] == ["no time was left"] * 2


def test_all_that_a_late_step_has_started_ends_with_it(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    child = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run_step("late", [sys.executable, "-c", program], 5.0).ended.startswith("stopped")
    pid = int(told.read_text())
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
