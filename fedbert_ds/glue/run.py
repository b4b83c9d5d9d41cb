"""One fine-tuning run: a task, a seed, a starting checkpoint; its result is written last."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedbert_ds.atomic_write import write_text
from fedbert_ds.errors import RunError, writes
from fedbert_ds.glue.checkpoint import check_fits, load_classifier, load_task_tokenizer
from fedbert_ds.glue.fine_tuning import Encoded, encode, fine_tune, predict
from fedbert_ds.glue.recipe import Recipe
from fedbert_ds.glue.submission import write_predictions
from fedbert_ds.seeding import generator
from fedbert_ds.tasks.glue_data import Examples, TaskData, read_task
from fedbert_ds.tasks.glue_tasks import GLUE, GlueTask
from fedbert_ds.tasks.metrics import Values, score, task_score
from fedbert_ds.tokenizer_folder import save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

RESULT, MODEL = "result.json", "model"
"""Files of a run's folder."""
PROGRESS_SECONDS = 2.0
"""Between two reports within an epoch."""


@dataclass(frozen=True)
class Run:
    """Which task, from which kind of checkpoint, with which seed."""

    task_name: str
    seed: int
    from_mnli: bool = False

    @property
    def row(self) -> str:
        """Its row in the table, and its folder."""
        return f"{self.task_name}-from-MNLI" if self.from_mnli else self.task_name

    @property
    def name(self) -> str:
        """As progress tells it."""
        return f"{self.row} seed {self.seed}"

    def folder(self, out: Path) -> Path:
        """Where its files are."""
        return out / self.row / f"seed-{self.seed}"

    @property
    def keeps_model(self) -> bool:
        """Whether its model is kept: small tasks may start from it."""
        return self.task_name == "MNLI"


@dataclass(frozen=True)
class DataSource:
    """Where examples come from and how many of them are used."""

    folder: Path | None
    """None reads the hub."""
    train_examples: int | None = None
    """At most so many, drawn once for all seeds; None takes all."""
    dev_examples: int | None = None

    def read(self, task: GlueTask) -> TaskData:
        """As `tasks.glue_data.read_task`."""
        data = read_task(task, self.folder)
        return TaskData(
            train=_drawn(data.train, self.train_examples, task.name),
            dev={split: _drawn(examples, self.dev_examples, task.name) for split, examples in data.dev.items()},
            test=data.test,
        )


@dataclass(frozen=True)
class Progress:
    """Where a run is."""

    run: Run
    epoch: int
    step: int
    steps: int
    loss: float
    """Mean over the epoch so far."""
    seconds_left: float
    score: float | None
    """Of the dev set, at the end of an epoch."""


def settings_of(checkpoint: str, data_digest: str, recipe: Recipe) -> dict[str, Any]:
    """What decides a result, beside the seed. `checkpoint` is a fingerprint or a hub name."""
    return {"checkpoint": checkpoint, "data": data_digest, **asdict(recipe)}


def finished(run: Run, out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The run's result if it is there; None if not.

    RunError, one line, if it was made with other settings or cannot be read.
    """
    path = run.folder(out) / RESULT
    if not path.is_file():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        made_with = result["settings"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise RunError(f"{path}: not a result of fedbert-ds glue; delete {path.parent}") from error
    for key in settings:
        if made_with.get(key) != settings[key]:
            raise RunError(
                f"{path}: made with {key} {made_with.get(key)}, now {settings[key]}; "
                f"change that back, name another --out, or delete {path.parent}"
            )
    return result


def fine_tune_run(
    run: Run,
    out: Path,
    model_name: str,
    settings: Mapping[str, Any],
    source: DataSource,
    recipe: Recipe,
    device: str,
    report: Callable[[Progress], None],
) -> None:
    """Fine-tune, predict, and write the run's folder: predictions, model, and last the result.

    `report` is called every few seconds and at the end of every epoch. UserErrors as those of
    loading; RunError where the loss is no number any more.
    """
    from transformers import set_seed

    data = source.read(GLUE[run.task_name])
    tokenizer = load_task_tokenizer(model_name)
    set_seed(run.seed)  # of a new classifier
    model = load_classifier(model_name, GLUE[run.task_name])
    check_fits(model_name, model, tokenizer, recipe.length)
    model.to(torch.device(device))  # type: ignore[arg-type]
    began = time.monotonic()
    tuned = _FineTuning(run, recipe, data, model, tokenizer)
    tuned.train(report)
    tuned.write_outputs(run.folder(out))
    result = {
        "task": run.task_name,
        "row": run.row,
        "seed": run.seed,
        "settings": dict(settings),
        "train_examples": len(data.train),
        "score": tuned.kept["score"],
        "dev": tuned.kept["dev"],
        "epoch": tuned.kept["epoch"],
        "epochs": tuned.epochs,
        "seconds": round(time.monotonic() - began, 1),
        "device": device,
    }
    write_text(run.folder(out) / RESULT, json.dumps(result, indent=2) + "\n")


class _FineTuning:
    """A model while it is trained and after it: scores of its epochs, and the epoch that counts."""

    def __init__(
        self, run: Run, recipe: Recipe, data: TaskData, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self.epochs: list[dict[str, Any]] = []
        self.kept: dict[str, Any] = {}
        """The entry of `epochs` whose weights the model has after training."""
        self._run, self._recipe, self._task, self._data = run, recipe, GLUE[run.task_name], data
        self._model, self._tokenizer = model, tokenizer

    def train(self, report: Callable[[Progress], None]) -> None:
        """All epochs; the model is left with the weights of the one that counts."""
        train = self._encoded(self._data.train)
        dev = {split: self._encoded(examples) for split, examples in self._data.dev.items()}
        steps = self._recipe.steps(len(train))
        began = reported = time.monotonic()
        losses: list[torch.Tensor] = []
        best_weights: dict[str, torch.Tensor] = {}
        for step in fine_tune(self._model, self._tokenizer, train, self._recipe, self._run.seed):
            losses.append(step.loss)
            now = time.monotonic()
            if not step.ends_epoch and now - reported < PROGRESS_SECONDS:
                continue
            reported = now
            loss = float(torch.stack(losses).mean())
            if not math.isfinite(loss):
                raise RunError(
                    f"{self._run.name}: the loss is {loss} at step {step.number}; use a smaller --learning-rate"
                )
            score_now = None
            if step.ends_epoch:
                scores = self._dev_scores(dev)
                score_now, losses = task_score(scores), []
                self.epochs.append({"epoch": step.epoch, "train_loss": loss, "score": score_now, "dev": scores})
                if not self._recipe.best_epoch:
                    self.kept = self.epochs[-1]
                elif not self.kept or score_now > self.kept["score"]:
                    self.kept = self.epochs[-1]
                    best_weights = {name: one.cpu().clone() for name, one in self._model.state_dict().items()}
            left = (steps - step.number) * (now - began) / step.number
            report(Progress(self._run, step.epoch, step.number, steps, loss, left, score_now))
        if best_weights:
            self._model.load_state_dict(best_weights)

    def write_outputs(self, folder: Path) -> None:
        """Predictions on test sets, and the model if the run keeps it."""
        from fedbert_ds.model.checkpoint import quiet_transformers

        for split, examples in self._data.test.items():
            write_predictions(folder, self._task, split, self._predicted(self._encoded(examples)))
        if self._run.keeps_model:
            with quiet_transformers(), writes(folder):
                self._model.save_pretrained(folder / MODEL)
                save_tokenizer(self._tokenizer, folder / MODEL)

    def _encoded(self, examples: Examples) -> Encoded:
        return encode(examples, self._tokenizer, self._recipe.length)

    def _predicted(self, encoded: Encoded) -> Values:
        return predict(self._model, self._tokenizer, encoded, self._recipe)

    def _dev_scores(self, dev: Mapping[str, Encoded]) -> dict[str, dict[str, float]]:
        """Metrics by split."""
        return {
            split: score(self._task.metrics, np.array([one["label"] for one in encoded]), self._predicted(encoded))
            for split, encoded in dev.items()
        }


def _drawn(examples: Examples, limit: int | None, name: str) -> Examples:
    """At most `limit` examples, the same for every seed, in the order of the file."""
    if limit is None or limit >= len(examples):
        return examples
    rows = generator("glue subset", name).choice(len(examples), limit, replace=False)
    return [examples[row] for row in sorted(rows)]
