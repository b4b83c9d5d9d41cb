"""Tasks of a comparison: what is refused, the recipe, and scores by task and seed."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit.glue.conftest import checkpoint  # noqa: F401 (a fixture)
from unit.tasks.glue_files import write_glue

from fedbert_ds.compare.tasks import TaskOptions, scores
from fedbert_ds.errors import ConfigError


def of(glue: Path | None, *tasks: str, seeds: tuple[int, ...] = (0,), rate: float | None = None) -> TaskOptions | None:
    return TaskOptions.of(glue, tasks, seeds, 1, rate, quick=False)


@pytest.mark.parametrize(
    ("glue", "tasks", "seeds", "words"),
    [
        (None, ("RTE",), (0,), "--tasks needs --glue DIR"),
        (Path("glue"), (), (0,), "--glue needs --tasks"),
        (Path("glue"), ("WNLI",), (0,), "WNLI is left out"),
        (Path("glue"), ("RTE", "rte"), (0,), "--tasks RTE RTE: name each once"),
        (Path("glue"), ("RTE",), (2, 2), "--glue-seeds 2 2: name each once"),
    ],
)
def test_what_is_refused(glue: Path | None, tasks: tuple[str, ...], seeds: tuple[int, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        of(glue, *tasks, seeds=seeds)
    assert of(None) is None


def test_a_bad_recipe_is_refused_before_any_work(tmp_path: Path) -> None:
    options = of(write_glue(tmp_path, "RTE"), "RTE", rate=-1.0)
    assert options is not None
    with pytest.raises(ConfigError, match="learning-rate"):
        options.check()


def test_a_score_for_each_task_and_seed_and_none_is_made_twice(
    checkpoint: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = of(write_glue(tmp_path / "glue", "RTE", "STS-B"), "RTE", "STS-B", seeds=(0, 1), rate=1e-3)
    assert options is not None
    options.check()
    found = scores(options, checkpoint, tmp_path / "out", "fedbert-ds compare")
    assert list(found) == ["RTE", "STS-B"] and all(len(values) == 2 for values in found.values())
    assert all(-1.0 <= value <= 1.0 for values in found.values() for value in values)
    monkeypatch.setattr("fedbert_ds.glue.processes.fine_tune_run", lambda **_: pytest.fail("made again"))
    assert scores(options, checkpoint, tmp_path / "out", "fedbert-ds compare") == found
    assert options.recipes(32)["RTE"].length == 32 and options.recipes(512)["RTE"].length == 128
