"""Predictions on GLUE's test sets, in the form that gluebenchmark.com takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedbert_ds.atomic_write import write_text
from fedbert_ds.tasks.glue_tasks import GLUE, HIGHEST_SCORE, GlueTask
from fedbert_ds.tasks.metrics import Values

SUFFIX = {"test": "", "test_matched": "-m", "test_mismatched": "-mm"}
"""What a split adds to its task's name."""


def file_name(task: GlueTask, split: str) -> str:
    """The name that GLUE gives the predictions of a test split: `MNLI-mm.tsv`."""
    return f"{task.name}{SUFFIX[split]}.tsv"


def prediction_words(task: GlueTask, predictions: Values) -> list[str]:
    """Predictions as GLUE reads them: words of labels, or scores from 0.000 to 5.000."""
    if task.labels is not None:
        return [task.labels[int(number)] for number in predictions]
    return [f"{value:.3f}" for value in np.clip(predictions, 0.0, HIGHEST_SCORE)]


def write_predictions(folder: Path, task: GlueTask, split: str, predictions: Values) -> None:
    """Write `index`, from 0 in the order of the test file, and `prediction`."""
    lines = ["index\tprediction"]
    lines += [f"{index}\t{word}" for index, word in enumerate(prediction_words(task, predictions))]
    write_text(folder / file_name(task, split), "\n".join(lines) + "\n")


def collect(out: Path, results: Iterable[Mapping[str, Any]]) -> list[str]:
    """Copy each task's predictions from its best run by dev score to `out`/submission.

    Returns the names of the files, in order; none where there were no test files. Among equals the
    first result counts.
    """
    best: dict[str, Mapping[str, Any]] = {}
    for result in results:
        held = best.get(result["task"])
        if held is None or result["score"] > held["score"]:
            best[result["task"]] = result
    names = []
    for result in best.values():
        task = GLUE[result["task"]]
        for split in task.splits("test"):
            source = out / result["row"] / f"seed-{result['seed']}" / file_name(task, split)
            if source.is_file():
                write_text(out / "submission" / source.name, source.read_text(encoding="utf-8"))
                names.append(source.name)
    return sorted(names)
