"""Which class of transformers holds an encoder with its head."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from fedbert_ds.tasks.registry import task_of
from fedbert_ds.tasks.task import Task

_CLASSES = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}


def auto_class(hf_config: Any) -> Any:
    """The `AutoModelFor...` of the head that a transformers config says; by default masked LM."""
    return auto_class_of(task_of(hf_config))


def auto_class_of(task: Task | None) -> Any:
    """As `auto_class`, of a task."""
    return AutoModelForMaskedLM if task is None else _CLASSES[task.head]
