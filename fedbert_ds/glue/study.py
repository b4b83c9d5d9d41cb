"""All runs of a checkpoint on GLUE: checked before work, resumed, then the tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbert_ds.errors import ConfigError
from fedbert_ds.folder_lock import locked
from fedbert_ds.glue.checkpoint import check_fits, check_mnli, fingerprint, load_classifier, load_task_tokenizer
from fedbert_ds.glue.processes import devices_at_hand, run_all
from fedbert_ds.glue.recipe import Recipe
from fedbert_ds.glue.run import MODEL, DataSource, Progress, Run, finished, settings_of
from fedbert_ds.glue.submission import collect
from fedbert_ds.glue.table import average, draw, measures, table
from fedbert_ds.tasks.glue_tasks import FROM_MNLI, GLUE
from fedbert_ds.telemetry.progress import duration
from fedbert_ds.telemetry.record import source_commit, write_record

OWN_MNLI = "own"
"""As `from_mnli`: the MNLI run of the same seed."""
QUIET_SECONDS = 30.0
"""Longest silence about a run."""


@dataclass(frozen=True)
class Study:
    """What to fine-tune, from what, how, and where results go."""

    model: str
    out: Path
    recipes: Mapping[str, Recipe]
    """By task; the tasks to run."""
    seeds: Sequence[int]
    source: DataSource
    command: str
    from_mnli: str | None = None
    """Small tasks also from here: a checkpoint, or OWN_MNLI."""
    device: str | None = None
    workers: int | None = None


def run_study(study: Study) -> list[dict[str, Any]]:
    """Fine-tune what is not there yet, write the tables, return all results.

    UserErrors, one line, before the first run: data, checkpoint, devices, and results in the folder
    that were made with other settings.
    """
    devices = devices_at_hand(study.device, study.workers)
    _check_seeds(study)
    data = {name: study.source.read(GLUE[name]) for name in study.recipes}
    _check_checkpoint(study)
    runs = _planned(study, {name: len(one.train) for name, one in data.items()})
    settings = _settings(study, runs, {name: one.digest for name, one in data.items()})
    del data  # each run reads its own
    _results(study, settings)  # raises for other settings
    with locked(study.out, "--out"):
        _make(study, runs, settings, devices)
        results = _results(study, settings)
        _write_tables(study, results)
    return results


def _make(study: Study, runs: Sequence[Run], settings: dict[Run, dict[str, Any]], devices: Sequence[str]) -> None:
    """Make the runs that are not there yet."""
    progress = _Printer(len(runs))
    # Small tasks from the own MNLI models wait for these.
    for stage in (False, True):
        jobs = []
        for run in (run for run in runs if run.from_mnli == stage):
            if stage and study.from_mnli == OWN_MNLI:
                settings[run]["checkpoint"] = fingerprint(_checkpoint(study, run))
            if finished(run, study.out, settings[run]) is not None:
                progress.skip(run)
                continue
            jobs.append(
                {
                    "run": run,
                    "out": study.out,
                    "model_name": _checkpoint(study, run),
                    "settings": settings[run],
                    "source": study.source,
                    "recipe": study.recipes[run.task_name],
                }
            )
        run_all(jobs, devices, progress.tell)


def _check_seeds(study: Study) -> None:
    if len(set(study.seeds)) != len(study.seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, study.seeds))}: name each once")
    if any(seed < 0 for seed in study.seeds):
        raise ConfigError(f"--seeds {min(study.seeds)}: must be 0 or more")


def _check_checkpoint(study: Study) -> None:
    tokenizer = load_task_tokenizer(study.model)
    longest = max(recipe.length for recipe in study.recipes.values())
    check_fits(study.model, load_classifier(study.model, GLUE[next(iter(study.recipes))]), tokenizer, longest)
    if study.from_mnli == OWN_MNLI and "MNLI" not in study.recipes:
        raise ConfigError("--from-mnli: add MNLI to --tasks, or name a checkpoint that is fine-tuned on it")
    if study.from_mnli not in (None, OWN_MNLI):
        check_mnli(study.from_mnli)
        load_task_tokenizer(study.from_mnli)


def _planned(study: Study, train_examples: Mapping[str, int]) -> list[Run]:
    """All runs, the longest first, so that workers end together."""
    names = sorted(study.recipes, key=lambda name: -study.recipes[name].steps(train_examples[name]))
    runs = [Run(name, seed) for name in names for seed in study.seeds]
    if study.from_mnli is not None:
        runs += [Run(name, seed, from_mnli=True) for name in names if name in FROM_MNLI for seed in study.seeds]
    return runs


def _checkpoint(study: Study, run: Run) -> str:
    """The checkpoint that a run starts from."""
    if not run.from_mnli:
        return study.model
    if study.from_mnli == OWN_MNLI:
        return str((Run("MNLI", run.seed).folder(study.out) / MODEL).absolute())
    return str(study.from_mnli)


def _settings(study: Study, runs: Sequence[Run], digests: Mapping[str, str]) -> dict[Run, dict[str, Any]]:
    """What each run would be made with; `digests` are the tasks' data."""
    checkpoints = {run: _checkpoint(study, run) for run in runs}
    # Each is read once: it may be large, and there are many runs.
    identity = {name: fingerprint(name) or name for name in set(checkpoints.values())}
    return {
        run: settings_of(identity[checkpoints[run]], digests[run.task_name], study.recipes[run.task_name])
        for run in runs
    }


def _results(study: Study, settings: Mapping[Run, Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = (finished(run, study.out, made_with) for run, made_with in settings.items())
    return [result for result in found if result is not None]


def _write_tables(study: Study, results: Sequence[Mapping[str, Any]]) -> None:
    text = table(results)
    out = study.out
    write_record(
        out / "table.json",
        command=study.command,
        commit=source_commit(),
        rows=[dict(result) for result in results],
        model=study.model,
        average=average(results),
        measures=[
            {"row": one.row, "metric": one.metric, "mean": one.mean, "spread": one.spread, "seeds": list(one.seeds)}
            for one in measures(results)
        ],
    )
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    draw(out / "table.png", results)
    print(text)
    print(f"table   {out / 'table.md'}, table.json, table.png")
    if names := collect(out, results):
        print(f"submit  {out / 'submission'}: {', '.join(names)}")


class _Printer:
    """Lines about runs: the end of every epoch, and where a run is when it was silent for long."""

    def __init__(self, num_runs: int) -> None:
        self._num_runs = num_runs
        self._done = 0
        self._told: dict[Run, float] = {}

    def skip(self, run: Run) -> None:
        """A run that was finished before."""
        self._done += 1
        self._print(f"{run.name}: finished before")

    def tell(self, progress: Progress) -> None:
        """A run's news."""
        now = time.monotonic()
        told = self._told.setdefault(progress.run, now)
        ended = progress.step == progress.steps
        self._done += ended
        if progress.score is None and now - told < QUIET_SECONDS:
            return
        self._told[progress.run] = now
        pieces = [f"epoch {progress.epoch}", f"step {progress.step}/{progress.steps}", f"loss {progress.loss:.3f}"]
        if progress.score is not None:
            pieces.append(f"dev {100 * progress.score:.1f}")
        if not ended:
            pieces.append(f"{duration(progress.seconds_left)} left")
        self._print(f"{progress.run.name}  {'  '.join(pieces)}")

    def _print(self, text: str) -> None:
        print(f"[{self._done}/{self._num_runs}] {text}", file=sys.stderr, flush=True)
