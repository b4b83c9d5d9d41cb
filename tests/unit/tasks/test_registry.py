"""A run file and the model's config mean the same task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig

from fedbert_ds.config import TaskSection
from fedbert_ds.tasks.registry import TASKS, task_of, task_of_section

SECTIONS = [
    TaskSection(name="sequence_classification", labels=("bad", "good")),
    TaskSection(name="sequence_regression"),
    TaskSection(name="token_classification", labels=("O", "B-X", "I-X")),
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_a_task_is_found_again_in_the_models_config(section: TaskSection, tmp_path: Path) -> None:
    task = task_of_section(section)
    assert task is not None and task.name == section.name and task.labels == section.labels
    config = BertConfig(architectures=[f"Bert{task.head}"], **task.config_fields)
    assert task_of(BertConfig.from_dict(config.to_dict())) == task
    config.save_pretrained(tmp_path)
    assert task_of(BertConfig.from_pretrained(tmp_path)) == task


@pytest.mark.parametrize(("outputs", "name"), [(1, "sequence_regression"), (3, "sequence_classification")])
def test_a_checkpoint_that_does_not_say_is_read_as_transformers_does(outputs: int, name: str) -> None:
    task = task_of(BertConfig(architectures=["BertForSequenceClassification"], num_labels=outputs))
    assert task is not None and task.name == name


@pytest.mark.parametrize("kinds", [None, [], ["BertForMaskedLM"], ["BertModel"], ["BertForQuestionAnswering"]])
def test_other_models_have_none(kinds: Any) -> None:
    assert task_of(BertConfig(architectures=kinds)) is None
    assert task_of_section(TaskSection()) is None


def test_every_name_of_the_run_file_is_a_task() -> None:
    assert {section.name for section in SECTIONS} == TASKS.keys()
