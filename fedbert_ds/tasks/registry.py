"""Which task a run file or a model means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedbert_ds.config import TaskSection
from fedbert_ds.tasks.sequence_tasks import SequenceClassification, SequenceRegression
from fedbert_ds.tasks.task import Task
from fedbert_ds.tasks.token_classification import TokenClassification

TASKS: dict[str, Callable[[tuple[str, ...]], Task]] = {
    "sequence_classification": SequenceClassification,
    "sequence_regression": SequenceRegression,
    "token_classification": TokenClassification,
}
"""By the run file's `task.name`; each takes its labels' words."""


def task_of_section(section: TaskSection) -> Task | None:
    """The task of a run file; None pre-trains by masked words."""
    return TASKS[section.name](section.labels) if section.is_labelled else None


def task_of(hf_config: Any) -> Task | None:
    """The task of a model, from its transformers config; None for a masked LM or a bare encoder."""
    kind = (getattr(hf_config, "architectures", None) or [""])[0]
    for task in TASKS.values():
        labels = tuple(str(hf_config.id2label[number]) for number in sorted(hf_config.id2label))
        one = task(labels)
        if kind.endswith(one.head) and one.config_fields["problem_type"] == hf_config.problem_type:
            return one
    return None
