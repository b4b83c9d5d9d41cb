"""The table of tasks: every task of GLUE but one, with a message for that one and for no task."""

from __future__ import annotations

import pytest

from fedbert_ds.errors import ConfigError
from fedbert_ds.tasks.glue_tasks import FROM_MNLI, GLUE, glue_task
from fedbert_ds.tasks.metrics import METRICS
from fedbert_ds.tasks.sequence_tasks import SequenceClassification, SequenceRegression


def test_every_task_but_wnli() -> None:
    assert set(GLUE) == {"CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE"}
    assert set(FROM_MNLI) == {"RTE", "MRPC", "STS-B"}


def test_official_metrics() -> None:
    """Wang et al., 2018, Table 1."""
    assert {name: set(task.metrics) for name, task in GLUE.items()} == {
        "CoLA": {"matthews"},
        "SST-2": {"accuracy"},
        "MRPC": {"f1", "accuracy"},
        "STS-B": {"pearson", "spearman"},
        "QQP": {"f1", "accuracy"},
        "MNLI": {"accuracy"},
        "QNLI": {"accuracy"},
        "RTE": {"accuracy"},
    }
    assert {metric for task in GLUE.values() for metric in task.metrics} == set(METRICS)


def test_shapes_and_splits() -> None:
    assert {name: task.num_outputs for name, task in GLUE.items() if task.num_outputs != 2} == {"MNLI": 3, "STS-B": 1}
    assert GLUE["MNLI"].splits("dev") == ("dev_matched", "dev_mismatched")
    assert GLUE["MNLI"].splits("test") == ("test_matched", "test_mismatched")
    assert GLUE["RTE"].splits("test") == ("test",)
    assert all(len(task.sentences) == len(task.hub_sentences) for task in GLUE.values())


def test_each_learns_what_a_run_file_may_name() -> None:
    assert GLUE["STS-B"].task == SequenceRegression()
    assert GLUE["MNLI"].task == SequenceClassification(("entailment", "neutral", "contradiction"))
    assert all(task.task.config_fields["num_labels"] == task.num_outputs for task in GLUE.values())


def test_names_are_found_however_they_are_cased() -> None:
    assert glue_task("sst-2") is GLUE["SST-2"]
    assert glue_task("CoLA") is GLUE["CoLA"]


@pytest.mark.parametrize("name, says", [("WNLI", "task WNLI is left out"), ("sst2", "task sst2: no such task; choose")])
def test_another_name_is_refused(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        glue_task(name)
