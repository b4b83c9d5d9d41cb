"""Labelled examples of GLUE, from its original .tsv files or from the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbert_ds.data.table_files import full_lines
from fedbert_ds.errors import DataError
from fedbert_ds.tasks.examples import LabelledText
from fedbert_ds.tasks.glue_tasks import HIGHEST_SCORE, GlueTask

HUB_DATA_SET = "nyu-mll/glue"


Examples = Sequence[LabelledText]


@dataclass(frozen=True)
class TaskData:
    """All that is known of a task. `dev` and `test` map splits to examples, in order of rows."""

    train: Examples
    dev: dict[str, Examples]
    test: dict[str, Examples]
    """Empty where there are no test files."""

    @property
    def digest(self) -> str:
        """16 hexadecimal digits, equal exactly if all labelled examples are, in order."""
        content = hashlib.sha256()
        for name, examples in (("train", self.train), *self.dev.items()):
            content.update(json.dumps([name, [[*e.texts, e.label] for e in examples]]).encode())
        return content.hexdigest()[:16]


def read_task(task: GlueTask, folder: Path | None) -> TaskData:
    """All splits of a task: from `folder`/TASK/*.tsv, or from the hub where `folder` is None.

    DataError, one line, for a missing file of `train` or `dev`, a missing column, a row that is cut
    short, a label outside the task's set, a file without rows, or a hub that cannot be read.
    """
    if folder is None:
        return _read_hub(task)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; --data names one with {task.name}/train.tsv and the like")
    here = folder / task.name
    tests = {split: here / f"{split}.tsv" for split in task.splits("test")}
    return TaskData(
        train=read_tsv(task, here / "train.tsv"),
        dev={split: read_tsv(task, here / f"{split}.tsv") for split in task.splits("dev")},
        test={
            split: read_tsv(task, path, labelled=False)
            for split, path in tests.items()
            if all(other.is_file() for other in tests.values())
        },
    )


def read_tsv(task: GlueTask, path: Path, *, labelled: bool = True) -> list[LabelledText]:
    """Examples of an original file: tab-separated, UTF-8, quotes mean nothing.

    Fields behind those of the header are ignored, as GLUE's own readers do. DataError as
    `read_task`.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; --data needs {task.name}'s original .tsv files, or leave {task.name} out"
        )
    lines = full_lines(path)
    if labelled and task.columns_without_header:
        header = list(task.columns_without_header)
    else:
        header = next(lines, (1, ""))[1].split("\t")
    wanted = [*task.sentences, *([task.label_column] if labelled else [])]
    if absent := [column for column in wanted if column not in header]:
        raise DataError(f"{path}: no column {absent[0]!r} (columns: {', '.join(header)}); use GLUE's original files")
    places = [header.index(column) for column in wanted]
    examples = []
    for number, line in lines:
        fields = line.split("\t")
        if len(fields) <= max(places):
            if task.skips_short_rows:
                continue
            raise DataError(
                f"{path}: line {number} has {len(fields)} fields, {max(places) + 1} are needed; "
                "use GLUE's original files"
            )
        texts = tuple(fields[place] for place in places[: len(task.sentences)])
        label = _label(task, fields[places[-1]], f"{path}: line {number}") if labelled else None
        examples.append(LabelledText(texts, label))
    return _not_empty(examples, str(path))


def _label(task: GlueTask, text: str, where: str) -> int | float:
    if task.labels is not None:
        if text not in task.labels:
            raise DataError(f"{where}: label {text!r} is none of {task.name}'s; use {', '.join(task.labels)}")
        return task.labels.index(text)
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not 0 <= score <= HIGHEST_SCORE:
        raise DataError(f"{where}: label {text!r} is none of {task.name}'s; use numbers from 0 to {HIGHEST_SCORE:g}")
    return score


def _not_empty(examples: list[LabelledText], where: str) -> list[LabelledText]:
    if not examples:
        raise DataError(f"{where}: holds no examples; use GLUE's original files")
    return examples


def _read_hub(task: GlueTask) -> TaskData:
    try:
        import datasets
    except ImportError as error:
        raise DataError("GLUE from the hub needs datasets: pip install fedbert-ds[glue], or name --data DIR") from error
    try:
        splits = datasets.load_dataset(HUB_DATA_SET, task.hub_name)
    except Exception as error:  # datasets, hub, network and file errors share no base
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"hub:{HUB_DATA_SET}:{task.hub_name}: cannot load it: {reason}; or name --data DIR") from error

    def examples(split: str, labelled: bool = True) -> list[LabelledText]:
        name = split.replace("dev", "validation")
        where = f"hub:{HUB_DATA_SET}:{task.hub_name}:{name}"
        if name not in splits:
            raise DataError(f"{where}: no such split; name --data DIR with the original files")
        return _not_empty(list(_hub_examples(task, splits[name], where, labelled)), where)

    return TaskData(
        train=examples("train"),
        dev={split: examples(split) for split in task.splits("dev")},
        test={split: examples(split, labelled=False) for split in task.splits("test")},
    )


def _hub_examples(task: GlueTask, rows: Iterable[Any], where: str, labelled: bool) -> Iterator[LabelledText]:
    for number, row in enumerate(rows):
        if absent := [column for column in (*task.hub_sentences, "label") if column not in row]:
            raise DataError(
                f"{where}: no column {absent[0]!r} (columns: {', '.join(row)}); name --data DIR with the original files"
            )
        label = row["label"]
        if not labelled:
            label = None
        elif task.labels is None:
            label = _label(task, str(label), f"{where}: row {number}")
        elif label not in range(len(task.labels)):
            raise DataError(
                f"{where}: row {number}: label {label!r} is none of {task.name}'s; use {', '.join(task.labels)}"
            )
        yield LabelledText(tuple(row[column] for column in task.hub_sentences), label)
