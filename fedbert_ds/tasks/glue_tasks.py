"""GLUE's tasks as data: columns, label sets, official metrics, names of files and of the hub."""

from __future__ import annotations

from dataclasses import dataclass

from fedbert_ds.errors import ConfigError
from fedbert_ds.tasks.sequence_tasks import SequenceClassification, SequenceRegression
from fedbert_ds.tasks.task import Task

ENTAILMENT = ("entailment", "not_entailment")
HIGHEST_SCORE = 5.0
"""Of STS-B; its lowest is 0."""


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE (Wang et al., 2018, Table 1), as its original .tsv files have it."""

    name: str
    """As GLUE spells it; also the folder's name."""
    sentences: tuple[str, ...]
    """Columns of the one or two texts."""
    label_column: str
    labels: tuple[str, ...] | None
    """The labels' words in the hub's order, which numbers them; None where the label is a score."""
    metrics: tuple[str, ...]
    """Official metrics, by the names of `tasks.metrics`."""
    hub_name: str
    """The configuration's name in the hub's data set."""
    hub_sentences: tuple[str, ...]
    """As `sentences`, in the hub's data set."""
    dev_splits: tuple[str, ...] = ("dev",)
    """Splits it is scored on; a test split for each."""
    columns_without_header: tuple[str, ...] | None = None
    """Columns of train and dev files that have no header line."""
    skips_short_rows: bool = False
    """Whether its official files hold damaged rows, which official readers leave out."""

    @property
    def num_outputs(self) -> int:
        """Width of the classifier."""
        return 1 if self.labels is None else len(self.labels)

    @property
    def task(self) -> Task:
        """What it learns, as a run file's `task` has it."""
        return SequenceRegression() if self.labels is None else SequenceClassification(self.labels)

    def splits(self, what: str) -> tuple[str, ...]:
        """Names of `dev` or `test` splits, in the same order."""
        return tuple(split.replace("dev", what) for split in self.dev_splits)


def _pair(name: str, hub_name: str, columns: tuple[str, str], metrics: tuple[str, ...] = ("accuracy",)) -> GlueTask:
    return GlueTask(name, columns, "label", ENTAILMENT, metrics, hub_name, columns)


GLUE: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask(
            "MNLI", ("sentence1", "sentence2"), "gold_label", ("entailment", "neutral", "contradiction"),
            ("accuracy",), "mnli", ("premise", "hypothesis"), dev_splits=("dev_matched", "dev_mismatched"),
        ),
        GlueTask(
            "QQP", ("question1", "question2"), "is_duplicate", ("0", "1"), ("f1", "accuracy"), "qqp",
            ("question1", "question2"), skips_short_rows=True,
        ),
        _pair("QNLI", "qnli", ("question", "sentence")),
        GlueTask("SST-2", ("sentence",), "label", ("0", "1"), ("accuracy",), "sst2", ("sentence",)),
        GlueTask(
            "CoLA", ("sentence",), "label", ("0", "1"), ("matthews",), "cola", ("sentence",),
            columns_without_header=("source", "label", "mark", "sentence"),
        ),
        GlueTask(
            "STS-B", ("sentence1", "sentence2"), "score", None, ("pearson", "spearman"), "stsb",
            ("sentence1", "sentence2"),
        ),
        GlueTask(
            "MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), ("f1", "accuracy"), "mrpc",
            ("sentence1", "sentence2"),
        ),
        _pair("RTE", "rte", ("sentence1", "sentence2")),
    )
}  # fmt: skip
"""By name, the largest first. WNLI is left out: its dev set contradicts its training set, so that
published results predict the majority class (Devlin et al., 2019, Section 4.1)."""

FROM_MNLI = ("STS-B", "MRPC", "RTE")
"""Small tasks that are also fine-tuned from an MNLI model (Liu et al., 2019, Section 5.1)."""


def glue_task(name: str) -> GlueTask:
    """The task of this name, however its letters are cased; ConfigError for another."""
    by_letters = {known.lower(): task for known, task in GLUE.items()}
    if name.lower() == "wnli":
        raise ConfigError("task WNLI is left out: its dev set contradicts its training set; drop it from --tasks")
    if name.lower() not in by_letters:
        raise ConfigError(f"task {name}: no such task; choose {', '.join(GLUE)}")
    return by_letters[name.lower()]
