"""One client by itself: the whole model, trained by plain code on the client's own text alone.

It gets as many windows as the federation, each of as many tokens, or of its own share alone. Its
held-out text is evaluated every so often, and the model of the lowest loss is kept: small texts are
soon known by heart. As a program:

    python -m fedbert_ds.compare.alone --config FILE --text DIR --client NAME --every N [--share]
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from typing import Any

import torch

from fedbert_ds.atomic_write import write_text
from fedbert_ds.compare.centralized import NUM_THREADS, Centralized, hand_over, new_run, shards_of, trained_windows
from fedbert_ds.compare.held_out import held_out_batch, loss_on
from fedbert_ds.config import RunConfig
from fedbert_ds.data.tokenizer import load_tokenizer
from fedbert_ds.errors import one_line_errors
from fedbert_ds.run_file import load_config
from fedbert_ds.server.queue.seats import window_shares
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.user_path import user_path

EVALUATIONS = "own_evaluations.json"
"""In the run's folder: [{windows, loss, masked_tokens}], in order."""


def train_alone(
    config: RunConfig,
    text: RunFolder,
    client: str,
    every: int,
    patience: int | None = None,
    share: bool = False,
    device: str = "cpu",
) -> None:
    """Train on the text of one client of the folder `text`; hf/ is the model of the lowest loss.

    It is evaluated every `every` windows and at the end. With `patience`, it ends after so many
    evaluations in a row that are no better than the best before. With `share` its batches are those
    that it draws in a federation of all clients of `text`.
    """
    run = new_run(config)
    tokenizer = load_tokenizer(str(text.tokenizer))
    batch = held_out_batch(config, text, client, tokenizer)
    shards = shards_of(text)
    trainer = Centralized(config, tokenizer, {client: shards[client]}, device)
    if share:
        sizes = {name: sum(len(article.text) for article in shard) for name, shard in shards.items()}
        trainer.shares = window_shares(
            sizes, config.window.tokens, config.window.share, largest=config.window.largest_share
        )
    evaluations: list[dict[str, Any]] = []
    best: dict[str, torch.Tensor] = {}
    for windows in trained_windows(trainer, run):
        if windows % every and windows != config.run.windows:
            continue
        found = loss_on(trainer.model, batch)
        evaluations.append({"windows": windows, "loss": found.loss, "masked_tokens": found.masked_tokens})
        print(f"after {windows} windows: held-out loss {found.loss:.3f}", flush=True)
        if evaluations[best_of(evaluations)] is evaluations[-1]:
            best = copy.deepcopy(trainer.model.state_dict())
        elif patience is not None and len(evaluations) - 1 - best_of(evaluations) >= patience:
            break
    trainer.model.load_state_dict(best)
    write_text(run.path / EVALUATIONS, json.dumps(evaluations))
    hand_over(trainer, tokenizer, run)


def best_of(evaluations: Sequence[dict[str, Any]]) -> int:
    """Place of the lowest loss, the first of equals; a loss that is no number is the highest."""
    losses = [one["loss"] if one["loss"] == one["loss"] else float("inf") for one in evaluations]
    return losses.index(min(losses))


def read_evaluations(run: RunFolder) -> list[dict[str, Any]]:
    """What `train_alone` has measured."""
    found: list[dict[str, Any]] = json.loads((run.path / EVALUATIONS).read_text(encoding="utf-8"))
    return found


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="One client of a federation, by itself.")
    parser.add_argument("--config", type=user_path, required=True, help="run file (YAML)")
    parser.add_argument("--text", type=user_path, required=True, metavar="DIR", help="shards and tokenizer")
    parser.add_argument("--client", required=True, metavar="NAME", help="whose text")
    parser.add_argument("--every", type=int, required=True, metavar="N", help="windows between evaluations")
    parser.add_argument("--patience", type=int, metavar="N", help="end after so many evaluations without a lower loss")
    parser.add_argument("--share", action="store_true", help="its part of a window's tokens only")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the run file from here")
    options = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(NUM_THREADS)
    config = load_config(options.config, options.overrides, needs_body=False)
    train_alone(
        config,
        RunFolder(options.text),
        options.client,
        options.every,
        options.patience,
        options.share,
        options.device,
    )


if __name__ == "__main__":
    main()
