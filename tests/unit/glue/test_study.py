"""A study resumes, refuses other settings before work, starts small tasks from MNLI's models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from unit.tasks.glue_files import write_glue

from fedbert_ds.errors import ConfigError, DataError, ModelError, RunError
from fedbert_ds.folder_lock import locked
from fedbert_ds.glue import study as study_module
from fedbert_ds.glue.checkpoint import load_classifier
from fedbert_ds.glue.recipe import Recipe
from fedbert_ds.glue.run import DataSource
from fedbert_ds.glue.study import OWN_MNLI, Study, run_study
from fedbert_ds.tasks.glue_tasks import GLUE

RECIPE = Recipe(epochs=2, learning_rate=1e-2, batch_size=2, length=24)


@pytest.fixture
def study(checkpoint: str, glue_files: Path, tmp_path: Path) -> Study:
    return Study(
        model=checkpoint,
        out=tmp_path / "out",
        recipes={"RTE": RECIPE, "MNLI": RECIPE, "STS-B": RECIPE},
        seeds=[0, 1],
        source=DataSource(glue_files),
        command="fedbert-ds glue",
    )


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Every job that is run, in order."""
    done: list[dict] = []
    run_as_ever = study_module.run_all

    def watch(jobs, devices, report) -> None:
        done.extend(jobs)
        run_as_ever(jobs, devices, report)

    monkeypatch.setattr(study_module, "run_all", watch)
    return done


def test_everything_is_written_and_a_second_start_runs_nothing(study: Study, jobs: list[dict], capsys) -> None:
    results = run_study(study)
    assert [(one["row"], one["seed"]) for one in results] == [
        (row, seed) for row in ("RTE", "MNLI", "STS-B") for seed in (0, 1)
    ]
    assert len(jobs) == 6
    first = capsys.readouterr()
    assert (study.out / "table.md").read_text() in first.out
    record = json.loads((study.out / "table.json").read_text())
    assert {"command", "commit", "machine", "versions", "rows", "measures", "average"} <= set(record)
    assert record["rows"] == results and len(record["measures"]) == 5
    assert (study.out / "table.png").is_file()
    assert "[6/6]" in first.err and "dev" in first.err
    jobs.clear()
    assert run_study(study) == results
    assert jobs == []
    assert "RTE seed 0: finished before" in capsys.readouterr().err


def test_only_what_is_missing_runs_again(study: Study, jobs: list[dict]) -> None:
    results = run_study(study)
    jobs.clear()
    (study.out / "RTE" / "seed-1" / "result.json").unlink()
    again = run_study(replace(study, seeds=[0, 1]))
    assert [(job["run"].row, job["run"].seed) for job in jobs] == [("RTE", 1)]
    assert [{**one, "seconds": 0} for one in again] == [{**one, "seconds": 0} for one in results]


def test_another_setting_is_refused_before_anything_runs(
    study: Study, jobs: list[dict], checkpoint: str, tmp_path: Path
) -> None:
    run_study(replace(study, recipes={"RTE": RECIPE}))
    jobs.clear()
    more = replace(study, seeds=[0, 1, 2])
    with pytest.raises(RunError, match=r"RTE/seed-0/result.json: made with epochs 2, now 3"):
        run_study(replace(more, recipes={"MNLI": RECIPE, "RTE": replace(RECIPE, epochs=3)}))
    other = tmp_path / "other"
    load_classifier(checkpoint, GLUE["RTE"]).save_pretrained(other)
    for path in Path(checkpoint).glob("*token*"):
        (other / path.name).write_bytes(path.read_bytes())
    with pytest.raises(RunError, match="made with checkpoint"):
        run_study(replace(more, model=str(other)))
    train = tmp_path / "glue" / "RTE" / "train.tsv"
    train.write_text(train.read_text().replace("rains", "snows"))
    with pytest.raises(RunError, match="made with data"):
        run_study(more)
    assert jobs == []


def test_two_commands_do_not_share_a_folder(study: Study, jobs: list[dict]) -> None:
    with locked(study.out, "--out"), pytest.raises(RunError, match=r"in use by process .*; end that first, or set"):
        run_study(study)
    assert not jobs


def test_small_tasks_start_from_the_own_mnli_models(study: Study, jobs: list[dict]) -> None:
    results = run_study(replace(study, from_mnli=OWN_MNLI))
    rows = [(job["run"].row, job["run"].seed) for job in jobs]
    assert set(rows[6:]) == {(f"{name}-from-MNLI", seed) for name in ("RTE", "STS-B") for seed in (0, 1)}
    for job in jobs[6:]:
        seed = job["run"].seed
        assert Path(job["model_name"]) == (study.out / "MNLI" / f"seed-{seed}" / "model").absolute()
    by_run = {(one["row"], one["seed"]): one for one in results}
    checkpoints = {by_run["RTE-from-MNLI", seed]["settings"]["checkpoint"] for seed in (0, 1)}
    assert len(checkpoints | {by_run["RTE", 0]["settings"]["checkpoint"]}) == 3
    assert by_run["RTE-from-MNLI", 0]["epochs"] != by_run["RTE", 0]["epochs"]
    assert "RTE-from-MNLI" in (study.out / "table.md").read_text()
    jobs.clear()
    assert run_study(replace(study, from_mnli=OWN_MNLI)) == results
    assert jobs == []


def test_small_tasks_start_from_a_given_mnli_model(study: Study, jobs: list[dict], checkpoint: str, tmp_path) -> None:
    load_classifier(checkpoint, GLUE["MNLI"]).save_pretrained(tmp_path / "mnli")
    for path in Path(checkpoint).glob("*token*"):
        (tmp_path / "mnli" / path.name).write_bytes(path.read_bytes())
    run_study(replace(study, recipes={"RTE": RECIPE}, seeds=[0], from_mnli=str(tmp_path / "mnli")))
    assert [(job["run"].row, job["model_name"]) for job in jobs] == [
        ("RTE", checkpoint),
        ("RTE-from-MNLI", str(tmp_path / "mnli")),
    ]


def test_test_files_become_a_submission(study: Study, tmp_path: Path) -> None:
    write_glue(tmp_path / "glue", "RTE", test=True)
    run_study(replace(study, recipes={"RTE": RECIPE}))
    assert (tmp_path / "out" / "submission" / "RTE.tsv").read_text().startswith("index\tprediction\n0\t")


def test_the_longest_task_begins(study: Study, jobs: list[dict]) -> None:
    run_study(replace(study, seeds=[0], recipes={"RTE": RECIPE, "STS-B": replace(RECIPE, epochs=3)}))
    assert [job["run"].row for job in jobs] == ["STS-B", "RTE"]


@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"seeds": [1, 1]}, ConfigError, "--seeds 1 1: name each once"),
        ({"seeds": [-1]}, ConfigError, "--seeds -1"),
        ({"workers": 0}, ConfigError, "--workers 0"),
        ({"device": "cuda"}, ConfigError, "--device cuda"),
        ({"model": "nobody/nothing-at-all"}, ModelError, "needs its tokenizer"),
        ({"recipes": {"RTE": replace(RECIPE, length=64)}}, ModelError, "use --length 32 or less"),
        ({"recipes": {"RTE": RECIPE}, "from_mnli": OWN_MNLI}, ConfigError, "add MNLI to --tasks"),
        ({"source": DataSource(Path("nowhere"))}, DataError, "nowhere: no such folder"),
    ],
)
def test_a_mistake_shows_before_anything_runs(study: Study, jobs: list[dict], change: dict, error, says: str) -> None:
    with pytest.raises(error, match=says):
        run_study(replace(study, **change))
    assert jobs == [] and not study.out.exists()


def test_a_checkpoint_without_mnlis_head_is_refused(study: Study, jobs: list[dict], checkpoint: str) -> None:
    with pytest.raises(ModelError, match="has no head of three labels"):
        run_study(replace(study, from_mnli=checkpoint))
    assert jobs == []
