"""A learning rate for each system, chosen on other text than the systems are compared on.

Every system but those of `SAME_STEPS` trains once at each rate with the next seed, which holds out
and deals other articles, starts from other weights and masks other words. The rate of the lowest
held-out loss is its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.modes.runs import finished
from benchmarks.modes.systems import RUN_FILE, ModesOptions, run_file_overrides
from fedbert_ds.compare.systems import CENTRALIZED, System
from fedbert_ds.run_file import load_config
from fedbert_ds.telemetry.tables import markdown

SAME_STEPS = {System("synchronous"): CENTRALIZED}
"""Systems that take another one's steps, and so its learning rate."""


@dataclass(frozen=True)
class Trial:
    """One system at one learning rate."""

    system: System
    learning_rate: float
    windows: int
    held_out_loss: float
    """Of articles that the trial's seed holds out, nats."""

    def row(self) -> dict[str, Any]:
        """For the record."""
        return {
            "system": self.system.name,
            "average_every": self.system.average_every,
            "learning_rate": self.learning_rate,
            "windows": self.windows,
            "held_out_loss": self.held_out_loss,
        }


def at_rate(options: ModesOptions, rate: float | None) -> ModesOptions:
    """The options with this learning rate for all systems; None: as they are."""
    return options if rate is None else replace(options, overrides=(*options.overrides, f"optimizer.lr={rate}"))


def tried(options: ModesOptions, commit: str | None) -> list[Trial]:
    """Every system at every learning rate; trials that are complete already are not repeated."""
    plans = [
        (system, rate, _trial_options(options, rate))
        for system in options.systems
        if system not in SAME_STEPS
        for rate in options.learning_rates
    ]
    # A setting that does not go with a system is an error before the first of them trains.
    configs = [load_config(RUN_FILE, run_file_overrides(system, theirs)) for system, _, theirs in plans]
    trials = []
    for (system, rate, theirs), config in zip(plans, configs, strict=True):
        print(f"learning rate {rate:g}, ", end="", flush=True)
        run = finished(system, config, theirs, commit, config.run.directory)
        trials.append(Trial(system, rate, len(run.windows), run.held_out_loss))
    return trials


def best_rates(trials: Sequence[Trial]) -> dict[System, float]:
    """Each system's learning rate of the lowest held-out loss; empty without trials."""
    worst_first = sorted(trials, key=_loss, reverse=True)
    best = {trial.system: trial.learning_rate for trial in worst_first}
    return best | {system: best[other] for system, other in SAME_STEPS.items() if other in best}


def table(trials: Sequence[Mapping[str, Any]]) -> str:
    """The record's trials as a Markdown table: a line a system, a column a rate, the best bold."""
    rates = sorted({row["learning_rate"] for row in trials})
    systems = dict.fromkeys(System(row["system"], row["average_every"]) for row in trials)
    losses = {(row["system"], row["average_every"], row["learning_rate"]): row["held_out_loss"] for row in trials}

    def cells(system: System) -> list[str]:
        of_rates = [losses[system.name, system.average_every, rate] for rate in rates]
        return [system.label, *(f"**{loss:.3f}**" if loss == min(of_rates) else f"{loss:.3f}" for loss in of_rates)]

    return markdown(["held-out loss at learning rate", *(f"{rate:.1e}" for rate in rates)], map(cells, systems))


def _loss(trial: Trial) -> float:
    # A run that has diverged has none.
    return trial.held_out_loss if math.isfinite(trial.held_out_loss) else math.inf


def _trial_options(options: ModesOptions, rate: float) -> ModesOptions:
    """The same run with the next seed, shortened with its warm-up, in a folder of its own."""
    compared = load_config(RUN_FILE, run_file_overrides(CENTRALIZED, options))
    windows = options.tuning_windows or compared.run.windows
    warmup = compared.optimizer.warmup_windows * windows // compared.run.windows
    shorter = (f"run.seed={compared.run.seed + 1}", f"run.windows={windows}", f"optimizer.warmup_windows={warmup}")
    trial = replace(options, work=options.work / "tuning" / f"{rate:g}", overrides=(*options.overrides, *shorter))
    return at_rate(trial, rate)
