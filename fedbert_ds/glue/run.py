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
from fedbert_ds.errors import RunError
from fedbert_ds.glue.checkpoint import check_fits, load_classifier, load_task_tokenizer
from fedbert_ds.glue.fine_tuning import Encoded, encode, fine_tune, predict
from fedbert_ds.glue.recipe import Recipe
from fedbert_ds.glue.submission import write_predictions
from fedbert_ds.seeding import generator
from fedbert_ds.tasks.glue_data import Examples, TaskData, read_task
from fedbert_ds.tasks.glue_tasks import GLUE, GlueTask
from fedbert_ds.tasks.metrics import score, task_score

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

    task = GLUE[run.task_name]
    data = source.read(task)
    tokenizer = load_task_tokenizer(model_name)
    set_seed(run.seed)  # of a new classifier
    model = load_classifier(model_name, task)
    check_fits(model_name, model, tokenizer, recipe.length)
    model.to(torch.device(device))  # type: ignore[arg-type]
    train = encode(data.train, tokenizer, recipe.length)
    dev = {split: encode(examples, tokenizer, recipe.length) for split, examples in data.dev.items()}
    labels = {split: np.array([example.label for example in examples]) for split, examples in data.dev.items()}

    began = reported = time.monotonic()
    epochs: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    best_score = -math.inf
    losses: list[torch.Tensor] = []
    for step in fine_tune(model, tokenizer, train, recipe, run.seed):
        losses.append(step.loss)
        now = time.monotonic()
        if not step.ends_epoch and now - reported < PROGRESS_SECONDS:
            continue
        reported = now
        left = (recipe.steps(len(train)) - step.number) * (now - began) / step.number
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise RunError(f"{run.name}: the loss is {loss} at step {step.number}; use a smaller --learning-rate")
        value = None
        if step.ends_epoch:
            scores = {
                split: score(task.metrics, labels[split], predict(model, tokenizer, examples, recipe))
                for split, examples in dev.items()
            }
            value = task_score(scores)
            epochs.append({"epoch": step.epoch, "train_loss": loss, "score": value, "dev": scores})
            if recipe.best_epoch and value > best_score:
                best_score = value
                best = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
            losses = []
        report(Progress(run, step.epoch, step.number, recipe.steps(len(train)), loss, left, value))

    if recipe.best_epoch:
        model.load_state_dict(best)
        kept = max(epochs, key=lambda epoch: epoch["score"])  # the first of equals, as above
    else:
        kept = epochs[-1]
    _write_outputs(run, out, task, data, model, tokenizer, recipe)
    result = {
        "task": run.task_name,
        "row": run.row,
        "seed": run.seed,
        "settings": dict(settings),
        "train_examples": len(train),
        "score": kept["score"],
        "dev": kept["dev"],
        "epoch": kept["epoch"],
        "epochs": epochs,
        "seconds": round(time.monotonic() - began, 1),
        "device": device,
    }
    write_text(run.folder(out) / RESULT, json.dumps(result, indent=2) + "\n")


def _write_outputs(
    run: Run,
    out: Path,
    task: GlueTask,
    data: TaskData,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
) -> None:
    from fedbert_ds.model.checkpoint import quiet_transformers

    folder = run.folder(out)
    for split, examples in data.test.items():
        encoded: Encoded = encode(examples, tokenizer, recipe.length)
        write_predictions(folder, task, split, predict(model, tokenizer, encoded, recipe))
    if run.keeps_model:
        with quiet_transformers():
            model.save_pretrained(folder / MODEL)
            tokenizer.save_pretrained(folder / MODEL)


def _drawn(examples: Examples, limit: int | None, name: str) -> Examples:
    """At most `limit` examples, the same for every seed, in the order of the file."""
    if limit is None or limit >= len(examples):
        return examples
    rows = generator("glue subset", name).choice(len(examples), limit, replace=False)
    return [examples[row] for row in sorted(rows)]
