"""Every task keeps what `Task` promises: a loss for each label, counts that add up, its columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedbert_ds.tasks.registry import TASKS
from fedbert_ds.tasks.task import Columns, Task, columns_of

LABELS = ("O", "B-X", "I-X")


@pytest.fixture(params=list(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param](LABELS)


def test_each_label_has_one_loss_and_counts_add_up(task: Task) -> None:
    width = len(task.labels) or 1
    torch.manual_seed(0)
    scores = torch.randn(6, width)
    labels = torch.randint(width, (6,)) if task.labels else torch.randn(6)
    assert task.losses(scores, labels).shape == (6,)
    whole = task.counts(scores, labels, [0, 2, 6])
    parts = zip(task.counts(scores[:2], labels[:2], [0, 2]), task.counts(scores[2:], labels[2:], [0, 4]), strict=True)
    assert len(whole) == task.num_counts and whole == pytest.approx([a + b for a, b in parts], rel=1e-12)
    assert all(isinstance(value, float) for value in task.measures(whole).values())


def test_nothing_labelled_is_counted_as_nothing(task: Task) -> None:
    width = len(task.labels) or 1
    labels = torch.empty(0, dtype=torch.int64 if task.labels else torch.float32)
    assert task.counts(torch.empty(0, width), labels, [0, 0]) == [0.0] * task.num_counts
    assert set(task.measures([0.0] * task.num_counts).values()) == {0.0}


def test_columns_of_a_user_replace_the_tasks_own(task: Task) -> None:
    assert columns_of(task) == task.columns
    assert columns_of(task, ["mine"], "gold") == Columns(("mine",), "gold")


def test_the_config_has_an_output_for_each_label(task: Task) -> None:
    fields: dict[str, Any] = task.config_fields
    assert fields["num_labels"] == (len(task.labels) or 1)
