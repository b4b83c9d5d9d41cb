"""What interrupted attempts at a run were made with and took adds up, whoever was killed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedbert_ds.compare.attempts import Attempts, begin, begun, forget, log_of


def attempt(folder: Path, attempts: Attempts, at: float, seconds: float) -> None:
    """One that began at this time, and whose last word was so many seconds later."""
    begin(folder, attempts)
    log_of(folder).write_text("window 3\n")
    (told,) = folder.parent.glob("*.json")
    os.utime(told, (at, at))
    os.utime(log_of(folder), (at + seconds, at + seconds))


def test_the_time_of_all_attempts_adds_up(tmp_path: Path) -> None:
    run = tmp_path / "synchronous"
    assert begun(run) is None
    attempt(run, Attempts("settings").and_one_by("a"), at=1_000.0, seconds=60.0)
    first = begun(run)
    assert first == Attempts("settings", ("a",), pytest.approx(60.0))
    attempt(run, first.and_one_by("b"), at=9_000.0, seconds=30.0)
    second = begun(run)
    assert second == Attempts("settings", ("a", "b"), pytest.approx(90.0))
    assert second.and_one_by("a").commit == "a, b", "each commit once"
    forget(run)
    assert begun(run) is None and not log_of(run).exists()


def test_an_attempt_that_said_nothing_took_no_time(tmp_path: Path) -> None:
    run = tmp_path / "synchronous"
    begin(run, Attempts("settings").and_one_by(None))
    told = begun(run)
    assert told is not None and told.seconds == 0.0 and told.commit is None
    attempt(run, told, at=1_000.0, seconds=-5.0)  # a log of an attempt before
    assert begun(run) == told
