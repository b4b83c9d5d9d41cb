"""`fedbert-ds glue` on the command line: defaults, a run from files, mistakes in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbert_ds.cli import main
from fedbert_ds.glue import study as study_module
from fedbert_ds.glue.study import OWN_MNLI, Study
from fedbert_ds.tasks.glue_tasks import GLUE


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch) -> list[Study]:
    asked: list[Study] = []
    monkeypatch.setattr(study_module, "run_study", asked.append)
    return asked


def test_by_default_all_tasks_from_the_hub_with_three_seeds(studies: list[Study]) -> None:
    main(["glue", "--model", "bert-base-uncased", "--out", "results"])
    (study,) = studies
    assert list(study.recipes) == list(GLUE)
    assert study.seeds == [0, 1, 2] and study.source.folder is None and study.from_mnli is None
    assert study.recipes["RTE"].epochs == 5 and study.recipes["SST-2"].epochs == 3
    assert all(recipe.warm_up == 0.06 and recipe.best_epoch for recipe in study.recipes.values())


def test_options(studies: list[Study]) -> None:
    base = ["glue", "--model", "m", "--out", "o", "--tasks", "rte", "MNLI"]
    main([*base, "--from-mnli", "--recipe", "run_glue", "--length", "64", "--train-examples", "9", "--workers", "2"])
    main([*base, "--from-mnli", "some/mnli", "--quick", "--data", "d"])
    first, second = studies
    assert list(first.recipes) == ["RTE", "MNLI"] and first.recipes["RTE"].length == 64
    assert (first.from_mnli, first.source.train_examples, first.workers) == (OWN_MNLI, 9, 2)
    assert (second.from_mnli, second.source.folder) == ("some/mnli", Path("d"))
    assert (second.source.train_examples, second.source.dev_examples, second.recipes["RTE"].epochs) == (64, 64, 1)


def test_from_files_to_a_table(checkpoint: str, glue_files: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "results"
    arguments = [
        "glue",
        "--model",
        checkpoint,
        "--data",
        str(glue_files),
        "--out",
        str(out),
        "--length",
        "24",
        "--quick",
    ]
    main([*arguments, "--seeds", "0"])
    printed = capsys.readouterr().out
    assert "| average of 8 tasks |" in printed and "| MNLI mm | accuracy |" in printed
    assert len(list(out.glob("*/seed-0/result.json"))) == 8


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--tasks", "WNLI"], "task WNLI is left out"),
        (["--tasks", "RTE", "rte"], "--tasks RTE rte: name each once"),
        (["--recipe", "best"], "--recipe best: choose standard, run_glue"),
        (["--train-examples", "0"], "--train-examples 0"),
        (["--tasks", "RTE", "--data", "nowhere"], "nowhere: no such folder"),
        (["--tasks", "RTE", "--epochs", "0"], "--epochs 0"),
    ],
)
def test_a_mistake_is_one_line_and_a_non_zero_exit(arguments: list[str], says: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["glue", "--model", str(tmp_path), "--out", str(tmp_path / "out"), *arguments])
    assert exit_.value.code != 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and says in errors[0]
