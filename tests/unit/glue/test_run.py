"""A run keeps its best epoch, writes its result last, and refuses one made otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from unit.tasks.glue_files import write_glue

from fedbert_ds.errors import RunError
from fedbert_ds.glue import run as run_module
from fedbert_ds.glue.checkpoint import fingerprint
from fedbert_ds.glue.fine_tuning import encode, predict
from fedbert_ds.glue.recipe import Recipe
from fedbert_ds.glue.run import DataSource, Progress, Run, fine_tune_run, finished, settings_of
from fedbert_ds.tasks.glue_data import LabelledText
from fedbert_ds.tasks.glue_tasks import GLUE

RECIPE = Recipe(epochs=4, learning_rate=3e-2, batch_size=2, length=24)


def run_once(
    run: Run, out: Path, checkpoint: str, folder: Path, recipe: Recipe = RECIPE
) -> tuple[dict, list[Progress]]:
    source = DataSource(folder)
    settings = settings_of(fingerprint(checkpoint) or "", source.read(GLUE[run.task_name]).digest, recipe)
    told: list[Progress] = []
    fine_tune_run(run, out, checkpoint, settings, source, recipe, "cpu", told.append)
    result = finished(run, out, settings)
    assert result is not None
    return result, told


def test_names_and_folders() -> None:
    run = Run("RTE", 3, from_mnli=True)
    assert (run.row, run.name) == ("RTE-from-MNLI", "RTE-from-MNLI seed 3")
    assert run.folder(Path("out")) == Path("out/RTE-from-MNLI/seed-3")


def test_a_result_says_what_happened(checkpoint: str, glue_files: Path, tmp_path: Path) -> None:
    result, told = run_once(Run("MNLI", 1), tmp_path / "out", checkpoint, glue_files)
    assert (result["task"], result["row"], result["seed"], result["train_examples"]) == ("MNLI", "MNLI", 1, 2)
    assert [epoch["epoch"] for epoch in result["epochs"]] == [1, 2, 3, 4]
    assert set(result["dev"]) == {"dev_matched", "dev_mismatched"}
    assert result["settings"]["learning_rate"] == 3e-2
    ends = [one for one in told if one.score is not None]
    assert [one.score for one in ends] == [epoch["score"] for epoch in result["epochs"]]
    assert (told[-1].step, told[-1].steps) == (4, 4)


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Dev scores as given, one an epoch."""
    ahead = iter(values)
    monkeypatch.setattr(run_module, "score", lambda *_: {"accuracy": next(ahead)})


@pytest.mark.parametrize(
    "values, best_epoch, kept",
    [([0.2, 0.7, 0.7, 0.5], True, 2), ([0.9, 0.7, 0.8, 0.5], False, 4), ([0, 0, 0, 0], True, 1)],
)
def test_the_kept_epoch_is_the_first_best_or_the_last(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[float], best_epoch: bool, kept: int
) -> None:
    """And the test predictions are its weights'."""
    folder = write_glue(tmp_path / "glue", "SST-2", test=True)
    states: list[dict] = []
    predict_as_ever = run_module.predict

    def watch(model, tokenizer, examples, recipe):
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return predict_as_ever(model, tokenizer, examples, recipe)

    monkeypatch.setattr(run_module, "predict", watch)
    scripted(monkeypatch, values)
    result, _ = run_once(Run("SST-2", 0), tmp_path / "out", checkpoint, folder, replace(RECIPE, best_epoch=best_epoch))
    assert (result["epoch"], result["score"]) == (kept, values[kept - 1])
    *by_epoch, at_test = states
    same = [all(torch.equal(state[name], at_test[name]) for name in state) for state in by_epoch]
    assert same == [epoch == kept for epoch in (1, 2, 3, 4)]


def test_test_predictions_and_mnlis_model_are_written(checkpoint: str, tmp_path: Path) -> None:
    folder = write_glue(tmp_path / "glue", "MNLI", test=True)
    run = Run("MNLI", 0)
    run_once(run, tmp_path / "out", checkpoint, folder)
    here = run.folder(tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(here / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(here / "model")
    (number,) = predict(model, tokenizer, encode([LabelledText(("Yes.", "No."), None)], tokenizer, 24), RECIPE)
    for name in ("MNLI-m.tsv", "MNLI-mm.tsv"):
        assert (here / name).read_text() == f"index\tprediction\n0\t{GLUE['MNLI'].labels[number]}\n"


def test_other_tasks_keep_no_model(checkpoint: str, glue_files: Path, tmp_path: Path) -> None:
    run_once(Run("RTE", 0), tmp_path / "out", checkpoint, glue_files)
    assert [path.name for path in Run("RTE", 0).folder(tmp_path / "out").iterdir()] == ["result.json"]


def test_the_same_seed_gives_the_same_result_and_another_does_not(
    checkpoint: str, glue_files: Path, tmp_path: Path
) -> None:
    first, again, other = (
        run_once(Run("RTE", seed), tmp_path / name, checkpoint, glue_files)[0]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first["epochs"] == again["epochs"] != other["epochs"]


def test_a_result_made_with_another_setting_is_refused(checkpoint: str, glue_files: Path, tmp_path: Path) -> None:
    run, out = Run("RTE", 0), tmp_path / "out"
    made, _ = run_once(run, out, checkpoint, glue_files)
    settings = made["settings"]
    assert finished(Run("RTE", 1), out, settings) is None
    for key, value in (("learning_rate", 1e-3), ("data", "0" * 16), ("checkpoint", "bert-base-uncased"), ("epochs", 3)):
        with pytest.raises(RunError, match=f"result.json: made with {key} .*, now {value}; change that back"):
            finished(run, out, settings | {key: value})
    (run.folder(out) / "result.json").write_text("{}")
    with pytest.raises(RunError, match="not a result of fedbert-ds glue; delete"):
        finished(run, out, settings)


def test_a_run_ended_at_its_last_write_counts_as_not_done(
    checkpoint: str, glue_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = Run("MNLI", 0), tmp_path / "out"
    monkeypatch.setattr(run_module, "write_text", lambda path, text: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_once(run, out, checkpoint, glue_files)
    assert (run.folder(out) / "model").is_dir()
    assert finished(run, out, {}) is None


def test_a_loss_that_is_no_number_ends_the_run_with_one_line(checkpoint: str, glue_files: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, learning_rate=1e30)
    with pytest.raises(RunError, match=r"RTE seed 0: the loss is nan at step \d; use a smaller --learning-rate"):
        run_once(Run("RTE", 0), tmp_path / "out", checkpoint, glue_files, recipe)


def test_a_subset_is_drawn_once_and_keeps_the_files_order(tmp_path: Path) -> None:
    lines = [f"text number {number}\t{number % 2}" for number in range(40)]
    (tmp_path / "SST-2").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "SST-2" / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines, ""]))
    task = GLUE["SST-2"]
    whole = DataSource(tmp_path).read(task)
    part = DataSource(tmp_path, train_examples=12).read(task)
    places = [whole.train.index(one) for one in part.train]
    assert len(places) == 12 and places == sorted(places) and places != list(range(12))
    assert len(part.dev["dev"]) == 40
    assert DataSource(tmp_path, train_examples=12).read(task).digest == part.digest != whole.digest
    assert DataSource(tmp_path, train_examples=40, dev_examples=99).read(task).digest == whole.digest
    assert len(DataSource(tmp_path, dev_examples=5).read(task).dev["dev"]) == 5
    assert np.unique(places).size == 12
