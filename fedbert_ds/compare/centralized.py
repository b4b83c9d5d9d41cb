"""Centralized training on the clients' own batches: one whole model in plain torch.

Every window takes exactly the sequences and masks that a federation's clients draw for it, so a
federated run can be held against it window by window. As a program it trains a run file and leaves
the folder a federated run leaves, less its checkpoints:

    python -m fedbert_ds.compare.centralized --config FILE [--text DIR] [section.key=value ...]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedbert_ds.atomic_write import write_text
from fedbert_ds.bench.text import batches_of
from fedbert_ds.client.footprint import peak_memory_bytes
from fedbert_ds.config import RunConfig
from fedbert_ds.data.corpus import Article, read_articles
from fedbert_ds.data.held_out import keep_apart
from fedbert_ds.data.masking import Batch, encode
from fedbert_ds.data.tokenizer import load_tokenizer, num_rows
from fedbert_ds.errors import RunError, one_line_errors, writes
from fedbert_ds.evaluation.masked_lm import scores_at
from fedbert_ds.federation.strategy import strategy_of_run
from fedbert_ds.folder_lock import holds_nothing
from fedbert_ds.model.checkpoint import build_model, quiet_transformers
from fedbert_ds.model.cut import client_skeleton
from fedbert_ds.model.optimizer import build_optimizer
from fedbert_ds.run_file import dump_config, load_config
from fedbert_ds.server.prepare import prepare_text
from fedbert_ds.server.queue.seats import window_shares
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.telemetry.metrics import MetricsLog, WindowMetrics, read_metrics
from fedbert_ds.telemetry.report import draw_loss
from fedbert_ds.tokenizer_folder import save_tokenizer
from fedbert_ds.user_path import user_path

NUM_THREADS = 1
"""Threads of the program: fixed, for the order of floating-point sums follows from it."""


@dataclass(frozen=True)
class Trained:
    """One window."""

    loss: float
    """Cross-entropy in nats per masked token, before the step."""
    tokens: int
    masked_tokens: int


class Centralized:
    """Trains the whole model, a window at a time, on what its participants would bring to it.

    `articles` are the clients' own, by name, with those that they keep out of training. Gradients
    are clipped by the norm of the whole gradient, as in `synchronous` mode without staleness.
    Dropout is drawn from torch's generator, so only without dropout does a federated run see the
    same numbers.
    """

    def __init__(
        self, config: RunConfig, tokenizer: Any, articles: Mapping[str, Sequence[Article]], device: str = "cpu"
    ) -> None:
        self.config = config
        self.model: Any = build_model(
            config.model, num_rows(tokenizer), tokenizer.pad_token_id, config.run.seed
        ).train()
        self.model.to(device)
        # Where a device's tensors take no part of a CPU's, parameters move as new ones, untied.
        self.model.tie_weights()
        sizes = {client: sum(len(article.text) for article in shard) for client, shard in articles.items()}
        strategy = strategy_of_run(config)
        participants = strategy.num_participants(len(articles))
        self.shares = window_shares(
            sizes, config.window.tokens, config.window.share, participants, config.window.largest_share
        )
        length = config.data.sequence_length
        self._sampler = strategy.sampler(config.run.seed, dict.fromkeys(articles, 0))
        self.streams = {
            client: batches_of(config, encode(_trained_on(config, shard), tokenizer, length), tokenizer, client)
            for client, shard in articles.items()
        }
        self.optimizer = build_optimizer(list(self.model.named_parameters()), config.optimizer)

    def train_window(self, window: int) -> Trained:
        """Draw the participants' batches, accumulate their gradients and step once."""
        batches = {
            client: stream.next_batch(window, self.shares[client])
            for client, stream in self.streams.items()
            if self._sampler.takes_part(client, window)
        }
        masked_tokens = sum(len(batch.labels) for batch in batches.values())
        loss = sum(self.accumulate(client, window, batch, masked_tokens) for client, batch in batches.items())
        if self.config.optimizer.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.gradient_clipping)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.learning_rate(window, self.config.run.windows)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Trained(loss, sum(len(batch.input_ids) for batch in batches.values()), masked_tokens)

    def accumulate(self, client: str, window: int, batch: Batch, masked_tokens: int) -> float:
        """Forward and backward of one client's batch; its part of the window's mean loss.

        `client` and `window` only say which batch it is, for a subclass that watches.
        """
        labels = torch.full_like(batch.input_ids, -100)
        labels[batch.masked_positions] = batch.labels
        input_ids, targets, ones = (
            torch.nn.utils.rnn.pad_sequence(
                list(tokens.split(batch.lengths)), batch_first=True, padding_value=value
            ).to(self.model.device)
            for tokens, value in ((batch.input_ids, 0), (labels, -100), (torch.ones_like(labels), 0))
        )
        chosen = targets != -100
        scores = scores_at(self.model, input_ids, ones, chosen)
        loss_sum = torch.nn.functional.cross_entropy(scores, targets[chosen], reduction="sum")
        loss = loss_sum / max(1, masked_tokens)
        loss.backward()
        return loss.item()


def train_centralized(config: RunConfig, text: RunFolder | None = None, device: str = "cpu") -> None:
    """Train the run file to its end; metrics.jsonl, loss.png and hf/ are in run.directory.

    `text` is a folder with shards and tokenizer; None makes them in run.directory. Raises RunError
    for a folder that is not empty.
    """
    run = new_run(config)
    tokenizer = load_tokenizer(str(text.tokenizer)) if text else prepare_text(config, run)[0]
    trainer = Centralized(config, tokenizer, shards_of(text or run), device)
    for _ in trained_windows(trainer, run):
        pass
    hand_over(trainer, tokenizer, run)


def new_run(config: RunConfig) -> RunFolder:
    """The empty folder of a run; RunError for one that is not."""
    folder = config.run.directory
    if not holds_nothing(folder):
        raise RunError(f"{folder}: holds a run already; set another run.directory")
    folder.mkdir(parents=True, exist_ok=True)
    return RunFolder(folder)


def shards_of(text: RunFolder) -> dict[str, list[Article]]:
    """Every local client's articles."""
    return {path.parent.name: list(read_articles([str(path)])) for path in sorted(text.clients.glob("*/shard.jsonl"))}


def trained_windows(trainer: Centralized, run: RunFolder) -> Iterator[int]:
    """Train window after window, and yield how many are trained; metrics.jsonl and loss.png stay.

    Ends early where the caller stops asking.
    """
    config, rows = trainer.config, []
    try:
        with MetricsLog(run.metrics) as log:
            for window in range(config.run.windows):
                started = time.monotonic()
                trained = trainer.train_window(window)
                rows.append(_metrics(config, window, trained, time.monotonic() - started, len(trainer.streams)))
                log.append(rows[-1])
                if (window + 1) % max(1, config.run.windows // 20) == 0:
                    print(f"window {window + 1}/{config.run.windows}  loss {trained.loss:.2f}", flush=True)
                yield window + 1
    finally:
        if rows:
            draw_loss(run.path / "loss.png", rows, {})


def hand_over(trainer: Centralized, tokenizer: Any, run: RunFolder) -> None:
    """Write hf/ and config.yaml, and print what training took, as clients do."""
    with quiet_transformers(), writes(run.model):
        trainer.model.save_pretrained(run.model)
        save_tokenizer(tokenizer, run.model)
    write_text(run.config, dump_config(trainer.config))
    rows = read_metrics(run.metrics)
    share = sum(row.masked_tokens for row in rows) / max(1, sum(row.tokens for row in rows))
    flops = client_skeleton(trainer.model.config, "whole").flops_per_token(share)
    print(f"peak memory {peak_memory_bytes() / 1e6:.0f} MB, {flops / 1e6:.2f} MFLOP per token", flush=True)


def _trained_on(config: RunConfig, shard: Sequence[Article]) -> list[Article]:
    return keep_apart(shard, config.data.client_held_out)[0]


def _metrics(config: RunConfig, window: int, trained: Trained, seconds: float, clients: int) -> WindowMetrics:
    return WindowMetrics(
        window=window,
        loss=trained.loss,
        tokens=trained.tokens,
        masked_tokens=trained.masked_tokens,
        lost_masked_tokens=0,
        seconds=seconds,
        busy_seconds=seconds,
        wait_seconds=0.0,
        forwards=clients,
        backwards=clients,
        dummy_micro_batches=0,
        fill=0.0,
        bytes_up=0,
        bytes_down=0,
        update_bytes_up=0,
        update_bytes_down=0,
        clients=clients,
        learning_rate=config.optimizer.learning_rate(window, config.run.windows),
    )


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Centralized training on what a federation's clients would draw.")
    parser.add_argument("--config", type=user_path, required=True, help="run file (YAML)")
    parser.add_argument("--text", type=user_path, metavar="DIR", help="shards and tokenizer (default: made anew)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the run file from here")
    options = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(NUM_THREADS)
    config = load_config(options.config, options.overrides, needs_body=False)
    train_centralized(config, RunFolder(options.text) if options.text else None, options.device)


if __name__ == "__main__":
    main()
