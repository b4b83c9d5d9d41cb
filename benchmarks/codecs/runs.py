"""Training runs, each made once: a run complete with the same settings is read, not repeated."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.codecs.settings import Setting, key_of
from benchmarks.codecs.split_training import RowFeedback, SplitTrainer
from fedbert_ds.atomic_write import write_text
from fedbert_ds.bench.text import batches_of
from fedbert_ds.config import Cut, RunConfig
from fedbert_ds.data.corpus import Article, read_articles
from fedbert_ds.data.masking import Batch, encode
from fedbert_ds.data.shards import hold_out
from fedbert_ds.data.tokenizer import train_wordpiece
from fedbert_ds.evaluation.masked_lm import unigram_loss
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import split
from fedbert_ds.telemetry.progress import duration
from fedbert_kernels.quantize import GROUP

QUICK_ARTICLES = 60
TEXT_SEED = 1
"""Which articles are held out, the same for all seeds."""


class Text:
    """Articles to hold out and to train on, as sequences, and the word pieces of the latter."""

    def __init__(self, config: RunConfig, quick: bool) -> None:
        limit = QUICK_ARTICLES if quick else config.data.max_articles
        self.articles: list[Article] = list(read_articles(config.data.source, max_articles=limit))
        self.articles_trained_on, held_out = hold_out(self.articles, config.data.held_out, TEXT_SEED)
        self.tokenizer = train_wordpiece(self.articles_trained_on, config.tokenizer.vocab_size)
        length = config.data.sequence_length
        self.train = encode(self.articles_trained_on, self.tokenizer, length)
        self.held_out = encode(held_out, self.tokenizer, length)

    def held_out_batches(self, config: RunConfig) -> list[Batch]:
        """The same masked tokens for every run."""
        batches = batches_of(config, self.held_out, self.tokenizer, "held out", TEXT_SEED)
        count = max(1, self.held_out.num_tokens // config.window.tokens)
        return [batches.next_batch(number, config.window.tokens) for number in range(count)]

    def unigram_loss(self, config: RunConfig) -> float:
        """Held-out loss of word frequency alone, nats."""
        labels = torch.cat([batch.labels for batch in self.held_out_batches(config)])
        return unigram_loss(self.train.token_counts(len(self.tokenizer)), labels)

    @property
    def digest(self) -> str:
        """Of everything that is trained on or held out."""
        digest = hashlib.sha256(self.train.tokens.numpy().tobytes())
        digest.update(self.held_out.tokens.numpy().tobytes())
        return digest.hexdigest()[:16]


def finished(
    setting: Setting, seed: int, config: RunConfig, text: Text, work: Path, *, begin: bool
) -> dict[str, Any] | None:
    """The run: read if complete with these settings, else made, or None unless `begin`."""
    slug = "-".join(
        [setting.model, setting.cut, *setting.codecs, setting.extra.replace(" ", "_") or "plain", f"{seed}"]
    )
    path, fingerprint = work / f"{slug}.json", _fingerprint(config, text)
    if path.is_file():
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["fingerprint"] == fingerprint:
            return run
    if not begin:
        return None
    run = {"setting": key_of(setting), "seed": seed, "fingerprint": fingerprint, **train(setting, seed, config, text)}
    write_text(path, json.dumps(run))
    print(
        f"{setting.label}, seed {seed}: held-out loss {run['held_out_loss']:.4f}, {duration(run['seconds'])}",
        flush=True,
    )
    return run


def train(setting: Setting, seed: int, config: RunConfig, text: Text) -> dict[str, Any]:
    """Train one setting from scratch: losses, tokens and bytes."""
    started, windows = time.monotonic(), config.run.windows
    section = config.model
    if setting.model == "factorized":
        # A quarter of the width, but no less than the columns that share a scale: padded groups
        # would look too exact.
        size = min(section.hidden_size, max(GROUP, section.hidden_size // 4))
        section = section.model_copy(update={"architecture": "electra", "embedding_size": size})
    model: Any = build_model(section, len(text.tokenizer), text.tokenizer.pad_token_id, seed)
    if setting.extra == "unit projection":
        weight = model.electra.embeddings_project.weight
        weight.data *= 1.0 / (section.initializer_range * weight.shape[1] ** 0.5)
    cut: Cut = setting.cut
    half, body = split(model, cut)
    if setting.extra == "kept in int8":
        body.recompute("int8")
    trainer = SplitTrainer(
        half,
        body,
        setting.wire,
        config.optimizer,
        windows,
        seed,
        stochastic=setting.extra == "stochastic",
        centred=setting.extra == "centred",
        updates="int8" if setting.extra == "int8 halves" else "fp32",
        feedback=RowFeedback(len(text.tokenizer), half.widths.activations) if setting.extra == "row feedback" else None,
    )
    batches = batches_of(config, text.train, text.tokenizer, "bench", seed)
    crossed = [
        trainer.train_window(window, batches.next_batch(window, config.window.tokens)) for window in range(windows)
    ]
    last = crossed[-max(1, windows // 20) :]
    return {
        "held_out_loss": trainer.loss(text.held_out_batches(config)),
        "training_loss": sum(one.loss_sum for one in last) / sum(one.masked for one in last),
        "tokens": sum(one.tokens for one in crossed),
        "bytes_up": sum(one.bytes_up for one in crossed),
        "bytes_down": sum(one.bytes_down for one in crossed),
        "seconds": time.monotonic() - started,
    }


def settings_of(config: RunConfig) -> dict[str, Any]:
    """What of the run file the runs follow, with no path of this machine in it."""
    tree = json.loads(config.model_dump_json(include={"model", "tokenizer", "optimizer"}))
    data = config.data
    return tree | {
        "windows": config.run.windows,
        "tokens": config.window.tokens,
        "sequence_length": data.sequence_length,
        "mask_probability": data.mask_probability,
        "whole_word": data.whole_word,
        "held_out": data.held_out,
    }


def _fingerprint(config: RunConfig, text: Text) -> str:
    return hashlib.sha256(json.dumps([settings_of(config), text.digest]).encode()).hexdigest()
