"""Evaluations: means and the worst, which is best, when to stop; written and read back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.errors import RunError
from fedbert_ds.telemetry.evaluations import (
    Evaluation,
    HeldOutLoss,
    best_of,
    evaluation_of,
    read_evaluations,
    without_improvement,
    write_evaluations,
)


def losses_of(*losses: float) -> list[Evaluation]:
    return [Evaluation(number + 1, {"ada": HeldOutLoss(loss, 1)}) for number, loss in enumerate(losses)]


def test_the_mean_is_over_tokens_and_the_worst_over_clients() -> None:
    told = {"ada": HeldOutLoss(30.0, 10), "bo": HeldOutLoss(10.0, 2), "cy": HeldOutLoss(0.0, 0)}
    evaluation = evaluation_of(4, told, ["ada", "bo", "cy", "di"])
    assert evaluation.loss == 40.0 / 12 and evaluation.worst == "bo"
    assert evaluation.missing == ("di",), "one without held-out text is not missing"
    assert evaluation.sentence == "held out 3.333, worst bo 5.000"


def test_where_nobody_holds_text_out_there_is_no_loss() -> None:
    evaluation = evaluation_of(4, {"ada": HeldOutLoss(0.0, 0)}, ["ada"])
    assert math.isnan(evaluation.loss) and evaluation.worst is None and evaluation.sentence == "nothing held out"
    assert best_of([evaluation]) is None and without_improvement([evaluation] * 5) == 0


def test_the_first_of_the_lowest_is_best() -> None:
    evaluations = losses_of(3.0, 2.0, 2.5, 2.0)
    assert best_of(evaluations) is evaluations[1]
    assert without_improvement(evaluations) == 2
    assert without_improvement(losses_of(3.0, 2.0, 1.0)) == 0 and without_improvement([]) == 0


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=20))
def test_patience_counts_evaluations_since_the_best(losses: list[float]) -> None:
    count = without_improvement(losses_of(*losses))
    before, since = losses[: len(losses) - count], losses[len(losses) - count :]
    assert before[-1] == min(losses) and all(loss >= before[-1] for loss in since)
    assert all(loss > before[-1] for loss in before[:-1])


def test_written_and_read_they_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    assert read_evaluations(path) == []
    evaluations = [
        evaluation_of(2, {"ada": HeldOutLoss(1 / 3, 7), "bo": HeldOutLoss(2.0, 1)}, ["ada", "bo"]),
        evaluation_of(4, {}, ["ada"]),
    ]
    write_evaluations(path, evaluations)
    assert read_evaluations(path) == evaluations
    assert "NaN" not in path.read_text(), "no JSON"
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(RunError, match=":3: not a line of evaluations"):
        read_evaluations(path)


def measures_of(counts: Sequence[float]) -> dict[str, float]:
    right, all_of_them = counts
    return {"accuracy": right / all_of_them}


def test_measures_of_a_task_are_each_clients_and_everybodys(tmp_path: Path) -> None:
    losses = {"bo": HeldOutLoss(2.0, 4, (1.0, 4.0)), "ada": HeldOutLoss(1.0, 1, (1.0, 1.0)), "cy": HeldOutLoss(0.0, 0)}
    evaluation = evaluation_of(7, losses, ["ada", "bo", "cy"], measures_of)
    assert evaluation.measures == {"accuracy": 2 / 5}, "over all examples, not the mean of two clients"
    assert {name: loss.measures for name, loss in evaluation.clients.items()} == {
        "ada": {"accuracy": 1.0},
        "bo": {"accuracy": 0.25},
    }
    assert evaluation.sentence == "held out 0.600, worst ada 1.000, accuracy 0.400"
    write_evaluations(tmp_path / "evaluations.jsonl", [evaluation])
    assert read_evaluations(tmp_path / "evaluations.jsonl") == [evaluation]


def test_where_nobody_holds_examples_out_there_is_no_measure() -> None:
    assert evaluation_of(7, {"ada": HeldOutLoss(0.0, 0, (0.0, 0.0))}, ["ada"], measures_of).measures == {}
