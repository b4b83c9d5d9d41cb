"""Text for benchmarks that start clients: equal shards and a tokenizer, made once in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedbert_ds.config import RunConfig
from fedbert_ds.data.corpus import read_articles
from fedbert_ds.data.masking import Batch, BatchStream, EncodedText, encode
from fedbert_ds.data.shards import deal, write_shard
from fedbert_ds.data.tokenizer import train_wordpiece


def prepare(config: RunConfig, folder: Path, num_clients: int) -> tuple[Path, Path]:
    """(folder of shards, one file for each client; folder of the tokenizer), from `data.source`."""
    shards, tokenizer = folder / f"shards-{num_clients}", folder / "tokenizer"
    if not (shards / "complete").is_file():
        articles = list(read_articles(config.data.source, max_articles=config.data.max_articles))
        train_wordpiece(articles, config.tokenizer.vocab_size).save_pretrained(tokenizer)
        for number, shard in enumerate(deal(articles, num_clients, "equal", 1.0, config.run.seed)):
            write_shard(shards / f"client-{number:03d}.jsonl", shard)
        (shards / "complete").touch()
    return shards, tokenizer


def batches_of(
    config: RunConfig, text: EncodedText, tokenizer: Any, client: str, seed: int | None = None
) -> BatchStream:
    """A text's batches, masked as the run file says; `seed` in place of the run's."""
    return BatchStream(
        text,
        tokenizer,
        mask_probability=config.data.mask_probability,
        whole_word=config.data.whole_word,
        seed=config.run.seed if seed is None else seed,
        client=client,
    )


def first_batches(config: RunConfig, shards: Path, tokenizer: Any, windows: int) -> Iterator[dict[str, Batch]]:
    """The batches of the first windows by client, as clients with equal shares draw them."""
    files = sorted(shards.glob("*.jsonl"))
    length = config.data.sequence_length
    streams = {
        file.stem: batches_of(config, encode(read_articles([str(file)]), tokenizer, length), tokenizer, file.stem)
        for file in files
    }
    share = max(1, config.window.tokens // len(files))
    for window in range(windows):
        yield {name: batches.next_batch(window, share) for name, batches in streams.items()}
