"""Fine-tuning of one model on one task with one seed, and its predictions: plain transformers code.

With the same seed every loss equals that of transformers' Trainer bit by bit, so its order of
examples and its use of random numbers are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from fedbert_ds.glue.recipe import Recipe
from fedbert_ds.tasks.glue_data import Examples
from fedbert_ds.tasks.sequence_tasks import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Encoded = Sequence[dict[str, Any]]
"""A dictionary for each example: `input_ids`, what else the tokenizer gives, `label` if any."""

PREDICTION_BATCH = 64


@dataclass(frozen=True)
class Step:
    """One optimizer step that is done."""

    number: int
    """From 1."""
    epoch: int
    """From 1."""
    ends_epoch: bool
    loss: Tensor
    """The batch's mean loss, on the device: reading it may wait for the device."""


def encode(examples: Examples, tokenizer: PreTrainedTokenizerFast, length: int) -> Encoded:
    """Token ids of every example, cut to `length` tokens; the longer text of two is cut first."""
    columns = encode_texts([example.texts for example in examples], tokenizer, length)
    return [
        {name: values[row] for name, values in columns.items()}
        | ({} if example.label is None else {"label": example.label})
        for row, example in enumerate(examples)
    ]


def fine_tune(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, train: Encoded, recipe: Recipe, seed: int
) -> Iterator[Step]:
    """Train the model in place, on its device; yields after every step.

    The caller may predict between steps: training mode is set again. `seed` decides the order of
    examples and dropout.
    """
    from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup, set_seed

    device = model.device
    set_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, recipe.warm_up_steps(len(train)), recipe.steps(len(train)))
    collate = DataCollatorWithPadding(tokenizer)
    number = 0
    for epoch in range(recipe.epochs):
        order = RandomSampler(train, generator=torch.Generator().manual_seed(seed + epoch))
        loader: DataLoader[Any] = DataLoader(train, recipe.batch_size, sampler=order, collate_fn=collate)  # type: ignore[arg-type]
        for batch in loader:
            model.train()
            loss = _loss(model, {name: tensor.to(device) for name, tensor in batch.items()}, recipe)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            number += 1
            yield Step(number, epoch + 1, number % len(loader) == 0, loss.detach())


@torch.inference_mode()
def predict(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: Encoded, recipe: Recipe
) -> NDArray[np.int64] | NDArray[np.float64]:
    """A label's number [n] int64, or a score [n] float64, for each example, in their order."""
    from transformers import DataCollatorWithPadding

    collate = DataCollatorWithPadding(tokenizer)
    was_training = model.training
    model.eval()
    # Like lengths together: less padding, which changes no more than rounding.
    order = sorted(range(len(examples)), key=lambda row: len(examples[row]["input_ids"]))
    outputs: list[Tensor] = []
    for start in range(0, len(order), PREDICTION_BATCH):
        rows = [examples[row] for row in order[start : start + PREDICTION_BATCH]]
        batch = collate([{name: value for name, value in row.items() if name != "label"} for row in rows])
        with _autocast(model, recipe):
            logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
        outputs.append(logits.float().cpu())
    model.train(was_training)
    in_order = torch.cat(outputs)
    in_order[order] = in_order.clone()
    if in_order.shape[1] == 1:
        return in_order[:, 0].double().numpy()
    return in_order.argmax(dim=1).numpy()


def _loss(model: PreTrainedModel, batch: dict[str, Tensor], recipe: Recipe) -> Tensor:
    with _autocast(model, recipe):
        loss: Tensor = model(**batch).loss
    return loss


def _autocast(model: PreTrainedModel, recipe: Recipe) -> torch.autocast:
    return torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.precision == "bf16")
