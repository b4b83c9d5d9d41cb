"""Every model is held against the same masked tokens of text that no system trains on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from unit.compare.small import CLIENTS, prepared

from fedbert_ds.compare import held_out
from fedbert_ds.compare.centralized import Centralized, shards_of
from fedbert_ds.data.corpus import read_articles
from fedbert_ds.data.held_out import keep_apart
from fedbert_ds.data.masking import encode
from fedbert_ds.data.tokenizer import load_tokenizer
from fedbert_ds.errors import DataError
from fedbert_ds.model.checkpoint import build_model


def test_the_same_masks_for_every_model_on_text_that_is_not_trained_on(tmp_path: Path) -> None:
    config, text = prepared(tmp_path)
    batches, again = held_out.held_out_batches(config, text), held_out.held_out_batches(config, text)
    assert tuple(batches) == CLIENTS
    tokenizer = load_tokenizer(str(text.tokenizer))
    trainer = Centralized(config, tokenizer, shards_of(text))
    for client, batch in batches.items():
        assert torch.equal(batch.input_ids, again[client].input_ids) and torch.equal(batch.labels, again[client].labels)
        assert len(batch.labels) and len(batch.input_ids) <= config.run.evaluate_tokens
        articles = list(read_articles([str(text.shard(client))]))
        trained_on, apart = keep_apart(articles, 0.2)
        assert apart and len(trained_on) + len(apart) == len(articles)
        kept = encode(trained_on, tokenizer, config.data.sequence_length)
        assert torch.equal(trainer.streams[client].text.tokens, kept.tokens)


def test_losses_are_sums_over_masked_tokens(tmp_path: Path) -> None:
    config, text = prepared(tmp_path)
    batches = held_out.held_out_batches(config, text)
    tokenizer = load_tokenizer(str(text.tokenizer))
    model = build_model(config.model, len(tokenizer), tokenizer.pad_token_id, 3).train()
    found = held_out.losses(model, batches)
    assert model.training
    total = 0.0
    for client, batch in batches.items():
        sum_here, begin = 0.0, 0
        targets = torch.full_like(batch.input_ids, -100)
        targets[batch.masked_positions] = batch.labels
        for length in batch.lengths:
            ids, labels = batch.input_ids[None, begin : begin + length], targets[begin : begin + length]
            scores = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            sum_here += torch.nn.functional.cross_entropy(scores, labels, reduction="sum").item()
            begin += length
        assert found[client].masked_tokens == len(batch.labels)
        assert found[client].loss_sum == pytest.approx(sum_here, rel=1e-5)
        total += sum_here
    masked = sum(len(batch.labels) for batch in batches.values())
    assert held_out.overall(found) == pytest.approx(total / masked, rel=1e-5)
    read = held_out.from_json(held_out.as_json(found))
    assert all(read[client].loss == pytest.approx(found[client].loss, rel=1e-12) for client in CLIENTS)


def test_word_frequency_is_that_of_all_training_text(tmp_path: Path) -> None:
    config, text = prepared(tmp_path)
    batches = held_out.held_out_batches(config, text)
    found = held_out.word_frequency(config, text, batches)
    tokenizer = load_tokenizer(str(text.tokenizer))
    counts = [1.0] * len(tokenizer)
    for client in CLIENTS:
        trained_on, _ = keep_apart(list(read_articles([str(text.shard(client))])), 0.2)
        for article in trained_on:
            for token in tokenizer(article.text, add_special_tokens=False)["input_ids"]:
                counts[token] += 1
    for client, batch in batches.items():
        expected = -sum(math.log(counts[label] / sum(counts)) for label in batch.labels.tolist()) / len(batch.labels)
        assert found[client].loss == pytest.approx(expected, rel=1e-6)
    for shard in text.clients.glob("*/shard.jsonl"):
        shard.unlink()
    assert held_out.word_frequency(config, text, batches) == found, "it is counted once"


def test_a_client_with_too_little_text_is_named(tmp_path: Path) -> None:
    config, text = prepared(tmp_path, data={"mask_probability": 1e-9})
    with pytest.raises(DataError, match="client-00: its held-out text is too short"):
        held_out.held_out_batches(config, text)
