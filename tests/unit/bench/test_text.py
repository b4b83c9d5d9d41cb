"""Shards and tokenizer are made once; batches are those that the clients of a run draw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedbert_ds.bench.pipeline.settings import RUN_FILE
from fedbert_ds.bench.text import batches_of, first_batches, prepare
from fedbert_ds.config import RunConfig
from fedbert_ds.data.corpus import Article, read_articles
from fedbert_ds.data.masking import encode
from fedbert_ds.data.shards import write_shard
from fedbert_ds.data.tokenizer import load_tokenizer
from fedbert_ds.run_file import load_config


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    articles = [Article(str(number), f"a lobster of {number} years lives on the sea floor " * 9) for number in range(6)]
    write_shard(tmp_path / "text.jsonl", articles)
    return load_config(
        RUN_FILE, [f"data.source=[{tmp_path / 'text.jsonl'}]", "tokenizer.vocab_size=100", "window.tokens=200"]
    )


def test_text_is_dealt_once(config: RunConfig, tmp_path: Path) -> None:
    shards, tokenizer = prepare(config, tmp_path / "work", 3)
    assert [path.name for path in sorted(shards.glob("*.jsonl"))] == [f"client-00{n}.jsonl" for n in range(3)]
    assert sum(len(list(read_articles([str(path)]))) for path in shards.glob("*.jsonl")) == 6
    written = (tokenizer / "tokenizer.json").stat().st_mtime_ns
    assert prepare(config, tmp_path / "work", 3) == (shards, tokenizer)
    assert (tokenizer / "tokenizer.json").stat().st_mtime_ns == written


def test_the_first_windows_are_what_each_client_draws(config: RunConfig, tmp_path: Path) -> None:
    shards, folder = prepare(config, tmp_path / "work", 2)
    tokenizer = load_tokenizer(str(folder))
    windows = list(first_batches(config, shards, tokenizer, 2))
    assert [set(window) for window in windows] == [{"client-000", "client-001"}] * 2
    text = encode(read_articles([str(shards / "client-001.jsonl")]), tokenizer, config.data.sequence_length)
    alone = batches_of(config, text, tokenizer, "client-001")
    for number, window in enumerate(windows):
        batch = alone.next_batch(number, 100)  # half of the window's tokens
        assert torch.equal(batch.input_ids, window["client-001"].input_ids)
        assert torch.equal(batch.labels, window["client-001"].labels)
