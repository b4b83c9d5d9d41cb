"""Loss and measures of any fine-tuned checkpoint of transformers on labelled files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedbert_ds.data.labelled import LabelledSequences
from fedbert_ds.data.masking import Batch
from fedbert_ds.data.tokenizer import load_tokenizer, local_folder
from fedbert_ds.errors import DataError, ModelError
from fedbert_ds.evaluation.batches import padded_batches
from fedbert_ds.evaluation.masked_lm import likeness, usable_devices
from fedbert_ds.model.architecture import position_limit, tells_texts_apart
from fedbert_ds.model.checkpoint import quiet_transformers
from fedbert_ds.model.heads import auto_class_of
from fedbert_ds.tasks.registry import task_of
from fedbert_ds.tasks.rows import read_rows
from fedbert_ds.tasks.task import Task, columns_of

LONGEST_SEQUENCE = 512


@dataclass(frozen=True)
class TaskResult:
    """What a checkpoint makes of labelled examples."""

    loss: float
    """Mean over all labels."""
    measures: dict[str, float]
    """The task's, by name."""
    examples: int
    labels: int


def evaluate_task(
    model_name_or_folder: str | Path,
    sources: Sequence[str],
    *,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    sequence_length: int | None = None,
    batch_size: int = 32,
    device: str | None = None,
) -> TaskResult:
    """Evaluate a fine-tuned checkpoint on files as `tasks.rows` reads them.

    Which task it is, its config says. `sequence_length` None takes the model's limit, at most 512.
    ModelError when it has no head for labels or no tokenizer, or `sequence_length` does not fit,
    DataError for rows that the task cannot read.
    """
    name = str(model_name_or_folder)
    model, task = _load(name)
    try:
        tokenizer = load_tokenizer(name)
    except DataError as error:
        raise ModelError(f"{error}; a checkpoint to evaluate needs its tokenizer beside it") from error
    columns = columns_of(task, text_columns, label_column)
    examples = [task.example(row, columns, where) for where, row in read_rows(sources)]
    limit = min(tokenizer.model_max_length, position_limit(model))
    if sequence_length is not None and sequence_length > limit:
        raise ModelError(f"{name}: sequences of {sequence_length} tokens do not fit; use at most {limit}")
    length = sequence_length or min(limit, LONGEST_SEQUENCE)
    sequences = task.encode(examples, tokenizer, length)
    if not len(sequences.labels):
        raise DataError(f"{', '.join(sources)}: no label to evaluate on; give more examples")
    model.to(usable_devices(device, 1)[0]).eval()
    loss, counts = _sums(model, task, sequences, batch_size, tokenizer.pad_token_id or 0)
    num_labels = len(sequences.labels)
    return TaskResult(loss / num_labels, task.measures(counts), len(examples), num_labels)


def is_fine_tuned(name: str) -> bool:
    """Whether a checkpoint, folder or hub name, has a head for labels."""
    from transformers import AutoConfig

    folder = local_folder(name)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(
                str(folder or name), local_files_only=folder is not None, trust_remote_code=False
            )
    except Exception:  # whoever loads it tells what is wrong with it
        return False
    return task_of(config) is not None


def scores_of(model: Any, task: Task, batch: Batch, padding: int) -> Tensor:
    """Outputs [m, K] of any classifier of transformers, for a batch that is padded here."""
    ids, ones = (
        pad_sequence(list(tokens.split(batch.lengths)), batch_first=True, padding_value=value)
        for tokens, value in ((batch.input_ids, padding), (torch.ones_like(batch.input_ids), 0))
    )
    kinds: dict[str, Tensor] = {}
    if batch.token_types is not None and tells_texts_apart(model.config):
        kinds["token_type_ids"] = pad_sequence(list(batch.token_types.split(batch.lengths)), batch_first=True)
    device = next(model.parameters()).device
    inputs = {"input_ids": ids, "attention_mask": ones, **kinds}
    scores: Tensor = model(**{key: tensor.to(device) for key, tensor in inputs.items()}).logits
    return scores if task.reads_first_token else scores[ones.bool().to(device)][batch.masked_positions.to(device)]


@torch.inference_mode()
def _sums(
    model: Any, task: Task, sequences: LabelledSequences, batch_size: int, padding: int
) -> tuple[float, list[float]]:
    """Sum of all losses, and of the counts."""
    lengths = sequences.text.lengths
    losses, counts = [], [0.0] * task.num_counts
    for numbers in padded_batches(lengths.argsort(stable=True), lengths, batch_size, likeness(model)):
        batch = sequences.batch(numbers)
        scores = scores_of(model, task, batch, padding).float().cpu()
        ends = torch.tensor([0, *accumulate(batch.lengths)])
        bounds = torch.searchsorted(batch.masked_positions, ends).tolist()
        losses.append(float(task.losses(scores, batch.labels).double().sum()))
        counts = [a + b for a, b in zip(counts, task.counts(scores, batch.labels, bounds), strict=True)]
    return math.fsum(losses), counts


def _load(name: str) -> tuple[Any, Task]:
    from transformers import AutoConfig

    folder = local_folder(name)
    where: dict[str, Any] = {"local_files_only": folder is not None, "trust_remote_code": False}
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(str(folder or name), **where)
            task = task_of(config)
            model = auto_class_of(task).from_pretrained(str(folder or name), dtype=torch.float32, **where)
    except Exception as error:  # hub, network, JSON and safetensors errors share no base
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{name}: cannot be loaded as a fine-tuned checkpoint ({reason}); name another") from error
    if task is None:
        raise ModelError(f"{name}: has no head for labels; name a checkpoint that was fine-tuned")
    return model, task
