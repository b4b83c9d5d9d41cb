"""Files as gluebenchmark.com takes them: names, header, words of labels, scores in range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedbert_ds.glue.submission import collect, file_name, prediction_words, write_predictions
from fedbert_ds.tasks.glue_tasks import GLUE


def test_file_names() -> None:
    names = {file_name(task, split) for task in GLUE.values() for split in task.splits("test")}
    assert names == {
        "CoLA.tsv", "SST-2.tsv", "MRPC.tsv", "STS-B.tsv", "QQP.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "QNLI.tsv", "RTE.tsv",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, predictions, words",
    [
        ("MNLI", np.array([2, 0, 1]), ["contradiction", "entailment", "neutral"]),
        ("QNLI", np.array([0, 1]), ["entailment", "not_entailment"]),
        ("CoLA", np.array([1, 0]), ["1", "0"]),
        ("STS-B", np.array([-0.2, 5.3, 2.71828]), ["0.000", "5.000", "2.718"]),
    ],
)
def test_words(tmp_path: Path, name: str, predictions: np.ndarray, words: list[str]) -> None:
    task = GLUE[name]
    assert prediction_words(task, predictions) == words
    write_predictions(tmp_path, task, task.splits("test")[0], predictions)
    lines = (tmp_path / file_name(task, task.splits("test")[0])).read_text().split("\n")
    assert lines == ["index\tprediction", *(f"{index}\t{word}" for index, word in enumerate(words)), ""]


def test_the_best_run_of_each_task_is_submitted(tmp_path: Path) -> None:
    results = [
        {"task": "RTE", "row": row, "seed": seed, "score": score}
        for row, seed, score in (("RTE", 0, 0.6), ("RTE", 1, 0.7), ("RTE-from-MNLI", 0, 0.7), ("RTE-from-MNLI", 1, 0.8))
    ]
    for place, result in enumerate(results):
        folder = tmp_path / result["row"] / f"seed-{result['seed']}"
        write_predictions(folder, GLUE["RTE"], "test", np.array([place % 2, place // 2]))
    assert collect(tmp_path, results[:3]) == ["RTE.tsv"]
    best = (tmp_path / "RTE" / "seed-1" / "RTE.tsv").read_text()
    assert (tmp_path / "submission" / "RTE.tsv").read_text() == best
    collect(tmp_path, results)
    best = (tmp_path / "RTE-from-MNLI" / "seed-1" / "RTE.tsv").read_text()
    assert (tmp_path / "submission" / "RTE.tsv").read_text() == best


def test_without_test_files_there_is_nothing_to_submit(tmp_path: Path) -> None:
    assert collect(tmp_path, [{"task": "RTE", "row": "RTE", "seed": 0, "score": 0.6}]) == []
    assert not (tmp_path / "submission").exists()
