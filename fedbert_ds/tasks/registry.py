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
    "sequence_regression": lambda _: SequenceRegression(),
    "token_classification": TokenClassification,
}
"""By the run file's `task.name`; each takes its labels' words."""


def task_of_section(section: TaskSection) -> Task | None:
    """The task of a run file; None pre-trains by masked words."""
    return TASKS[section.name](section.labels) if section.is_labelled else None


def task_of(hf_config: Any) -> Task | None:
    """The task of a model, from its transformers config; None for a masked LM or a bare encoder."""
    kind = (getattr(hf_config, "architectures", None) or [""])[0]
    problem = getattr(hf_config, "problem_type", None)
    labels = tuple(str(hf_config.id2label[number]) for number in sorted(hf_config.id2label))
    if kind.endswith(TokenClassification.head):
        return TokenClassification(labels)
    if not kind.endswith(SequenceClassification.head) or problem == "multi_label_classification":
        return None
    # Without a word on it transformers goes by the number of outputs.
    is_score = problem == "regression" if problem else len(labels) == 1
    return SequenceRegression() if is_score else SequenceClassification(labels)
