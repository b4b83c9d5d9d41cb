"""Trials take another seed, each system the rate of its lowest loss, and `synchronous` that of
centralized training."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.modes import tuning
from benchmarks.modes.comparison import Run
from benchmarks.modes.systems import RUN_FILE, ModesOptions, run_file_overrides
from benchmarks.modes.tuning import Trial, at_rate, best_rates, table, tried
from fedbert_ds.compare.systems import CENTRALIZED, System
from fedbert_ds.config import RunConfig
from fedbert_ds.errors import ConfigError
from fedbert_ds.run_file import load_config

SEQUENTIAL = System("sequential", 10)
OPTIONS = ModesOptions(
    data="wiki.tokens",
    out=Path("whole.json"),
    command="",
    work=Path("work"),
    whole=True,
    learning_rates=(1e-3, 2e-3),
    tuning_windows=100,
    overrides=("run.windows=200", "optimizer.warmup_windows=20"),
)


def trial(system: System, rate: float, loss: float) -> Trial:
    return Trial(system, rate, 100, loss)


def test_the_rate_of_the_lowest_loss() -> None:
    trials = [
        trial(CENTRALIZED, 1e-3, 6.5), trial(CENTRALIZED, 2e-3, 6.4), trial(CENTRALIZED, 4e-3, math.nan),
        trial(SEQUENTIAL, 1e-3, 6.8), trial(SEQUENTIAL, 2e-3, 6.9),
    ]  # fmt: skip
    assert best_rates(trials) == {CENTRALIZED: 2e-3, System("synchronous"): 2e-3, SEQUENTIAL: 1e-3}
    assert best_rates([]) == {}


def test_table() -> None:
    trials = [
        trial(CENTRALIZED, 1e-3, 6.5), trial(CENTRALIZED, 2e-3, 6.4), trial(SEQUENTIAL, 1e-3, 6.8),
        trial(SEQUENTIAL, 2e-3, 6.9),
    ]  # fmt: skip
    assert table([trial.row() for trial in trials]).splitlines() == [
        "| held-out loss at learning rate | 1.0e-03 | 2.0e-03 |",
        "| --- | --: | --: |",
        "| centralized | 6.500 | **6.400** |",
        "| sequential, average every 10 | **6.800** | 6.900 |",
    ]


def test_a_rate_comes_after_what_the_user_set() -> None:
    options = replace(OPTIONS, overrides=("optimizer.lr=5.0",))
    assert load_config(RUN_FILE, run_file_overrides(CENTRALIZED, at_rate(options, 0.25))).optimizer.lr == 0.25
    assert at_rate(options, None) is options


def test_trials_are_shorter_with_another_seed_in_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[RunConfig] = []

    def finished(system: System, config: RunConfig, options: ModesOptions, commit: str | None, reference: Path) -> Run:
        made.append(config)
        return Run(system, [], config.optimizer.lr, 7.0, seconds=1.0, commit=commit)

    monkeypatch.setattr(tuning, "finished", finished)
    trials = tried(OPTIONS, "abc")
    assert {trial.system for trial in trials} == set(OPTIONS.systems) - {System("synchronous")}
    assert len(trials) == len(made) == 2 * 5 == len({config.run.directory for config in made})
    for config in made:
        assert (config.run.seed, config.run.windows, config.optimizer.warmup_windows) == (2, 100, 10)
        assert config.run.directory.is_relative_to(Path("work") / "tuning")
    row = json.loads(json.dumps(trials[0].row()))
    assert row["system"] == "centralized" and row["learning_rate"] == 1e-3 and row["held_out_loss"] == 1e-3


def test_settings_that_do_not_go_together_are_refused_before_anything_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "finished", lambda *_: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="average_every"):
        tried(replace(OPTIONS, tuning_windows=90), None)
