"""A model's loss on each client's held-out text: the same masked tokens for every model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from fedbert_ds.atomic_write import write_text
from fedbert_ds.config import RunConfig
from fedbert_ds.data.corpus import read_articles
from fedbert_ds.data.held_out import evaluation_batch, keep_apart
from fedbert_ds.data.masking import Batch, encode
from fedbert_ds.data.tokenizer import load_tokenizer
from fedbert_ds.errors import DataError
from fedbert_ds.evaluation.masked_lm import load_masked_lm, summed_loss, unigram_loss
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.telemetry.evaluations import Evaluation, HeldOutLoss

WORD_FREQUENCY = "word_frequency.json"
"""In the text's folder: losses of the training text's word frequencies."""

Losses = dict[str, HeldOutLoss]
"""By client."""
Batches = Mapping[str, Batch]
"""Masked held-out text, by client."""


def held_out_batches(config: RunConfig, text: RunFolder) -> dict[str, Batch]:
    """Each local client's held-out text, masked: what it evaluates on with `run.evaluate_every`.

    DataError for a client with so little text that no token of it is masked.
    """
    tokenizer = load_tokenizer(str(text.tokenizer))
    return {path.parent.name: held_out_batch(config, text, path.parent.name, tokenizer) for path in shards(text)}


def held_out_batch(config: RunConfig, text: RunFolder, client: str, tokenizer: Any) -> Batch:
    """As `held_out_batches`, of one client."""
    _, held_out = keep_apart(list(read_articles([str(text.shard(client))])), config.data.client_held_out)
    batch = evaluation_batch(
        encode(held_out, tokenizer, config.data.sequence_length),
        tokenizer,
        mask_probability=config.data.mask_probability,
        whole_word=config.data.whole_word,
        seed=config.run.seed,
        client=client,
        max_tokens=config.run.evaluate_tokens,
    )
    if not len(batch.labels):
        raise DataError(
            f"{client}: its held-out text is too short, no token of it is masked; raise data.client_held_out, or give "
            "it more text"
        )
    return batch


def losses_of(name: str, batches: Batches, seed: int, device: str) -> Losses:
    """Of a checkpoint, a folder or a hub name; `seed` decides a head that it lacks."""
    return losses(load_masked_lm(name, seed).to(torch.device(device)), batches)  # type: ignore[arg-type]


def losses(model: Any, batches: Batches) -> Losses:
    """Of a masked LM of transformers, in memory, on its device."""
    return {client: loss_on(model, batch) for client, batch in batches.items()}


def loss_on(model: Any, batch: Batch) -> HeldOutLoss:
    """Of a masked LM of transformers, on one client's held-out text."""
    return HeldOutLoss(summed_loss(model, batch), len(batch.labels))


def overall(found: Losses) -> float:
    """Mean over all masked tokens of all clients, nats."""
    return Evaluation(0, found).loss


def word_frequency(config: RunConfig, text: RunFolder, batches: Batches) -> Losses:
    """What the word frequencies of all clients' training text reach; computed once."""
    path = text.path / WORD_FREQUENCY
    if not path.is_file():
        tokenizer = load_tokenizer(str(text.tokenizer))
        counts = torch.zeros(len(tokenizer), dtype=torch.int64)
        for shard in shards(text):
            train, _ = keep_apart(list(read_articles([str(shard)])), config.data.client_held_out)
            counts += encode(train, tokenizer, config.data.sequence_length).token_counts(len(tokenizer))
        found = {client: unigram_loss(counts, batch.labels) * len(batch.labels) for client, batch in batches.items()}
        write_text(path, json.dumps(found))
    sums = json.loads(path.read_text(encoding="utf-8"))
    return {client: HeldOutLoss(sums[client], len(batch.labels)) for client, batch in batches.items()}


def as_json(found: Losses) -> dict[str, dict[str, float]]:
    """For a file; `from_json` reads it."""
    return {client: {"loss": one.loss, "masked_tokens": one.masked_tokens} for client, one in found.items()}


def from_json(tree: Mapping[str, Mapping[str, float]]) -> Losses:
    """What `as_json` wrote."""
    return {
        client: HeldOutLoss(one["loss"] * one["masked_tokens"], int(one["masked_tokens"]))
        for client, one in tree.items()
    }


def shards(text: RunFolder) -> list[Any]:
    """Files of all local clients' text, in order of names."""
    return sorted(text.clients.glob("*/shard.jsonl"))
