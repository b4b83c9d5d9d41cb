"""What `fedbert-ds glue` is held against: transformers' Trainer, as its run_glue.py uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fedbert_ds.glue.recipe import Recipe
from fedbert_ds.model.checkpoint import quiet_transformers
from fedbert_ds.tasks.glue_data import Examples, TaskData
from fedbert_ds.tasks.glue_tasks import GlueTask


def plain_run(
    model_name: str, task: GlueTask, data: TaskData, recipe: Recipe, seed: int, work: Path
) -> tuple[dict[str, dict[str, float]], list[float]]:
    """Metrics by dev split, and the loss of every step; on the CPU, in fp32, the last epoch counts.

    Padding is to the longest text of a batch: run_glue.py's --pad_to_max_length False.
    """
    set_seed(seed)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(model_name)
        model = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=task.num_outputs)
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=32,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warm_up,
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )

    def encoded(examples: Examples) -> Any:
        return [
            {**tokenizer(*example.texts, truncation=True, max_length=recipe.length), "label": example.label}
            for example in examples
        ]

    trainer = _Watched(
        model=model,
        args=arguments,
        train_dataset=encoded(data.train),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    losses = list(trainer.losses)
    return {
        split: _metrics(task, trainer.predict(encoded(examples)).predictions, [one.label for one in examples])
        for split, examples in data.dev.items()
    }, losses


class _Watched(Trainer):
    """A Trainer that remembers the loss of every batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own."""
        found = super().compute_loss(*args, **kwargs)
        loss: torch.Tensor = found[0] if isinstance(found, tuple) else found
        self.losses.append(loss.item())
        return found


def _metrics(task: GlueTask, logits: Any, labels: list[Any]) -> dict[str, float]:
    """Written out once more, task by task, so that a mistake in the table of tasks shows."""
    if task.name == "STS-B":
        scores = np.squeeze(logits)
        return {"pearson": float(pearsonr(scores, labels)[0]), "spearman": float(spearmanr(scores, labels)[0])}
    chosen = np.argmax(logits, axis=1)
    if task.name == "CoLA":
        return {"matthews": float(matthews_corrcoef(labels, chosen))}
    if task.name in ("MRPC", "QQP"):
        return {"f1": float(f1_score(labels, chosen)), "accuracy": float(accuracy_score(labels, chosen))}
    return {"accuracy": float(accuracy_score(labels, chosen))}
