"""`python -m benchmarks.optimizers`: one model trained by AdamW and by Muon on the same batches.

Held-out loss against windows. An optimizer's learning rate is the one of the lowest held-out loss
with a seed of its own, which holds out other articles, starts from other weights and masks other
words. A body under DeepSpeed steps as the model here does (tests/integration/test_equality.py), so
one process without ranks is enough.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.modes.systems import RUN_FILE
from fedbert_ds.bench.process import exit_on_sigterm
from fedbert_ds.compare.centralized import Centralized
from fedbert_ds.config import RunConfig
from fedbert_ds.data.corpus import read_articles
from fedbert_ds.data.masking import encode
from fedbert_ds.evaluation.masked_lm import masked_lm_loss
from fedbert_ds.run_file import load_config
from fedbert_ds.server.prepare import prepare_text
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.telemetry.plots import COLORS, picture
from fedbert_ds.telemetry.record import source_commit, write_record
from fedbert_ds.telemetry.tables import markdown

OPTIMIZERS = ("adamw", "muon")
BASELINE = "adamw"
TUNING_SEED = 100
QUICK = (
    "run.windows=4",
    "tokenizer.vocab_size=300",
    "data.max_articles=8",
    "window.tokens=512",
    "window.tokens_per_micro_batch=256",
    "optimizer.warmup_windows=1",
    "clients.expected=1",
    "clients.local=1",
)


@dataclass(frozen=True)
class OptimizersOptions:
    """What a user gives the benchmark."""

    out: Path
    command: str
    rates: tuple[float, ...]
    seeds: int
    every: int
    quick: bool = False
    overrides: tuple[str, ...] = ()


def bench_optimizers(options: OptimizersOptions) -> None:
    """Choose rates, train every optimizer with every seed, write the record and a picture."""
    exit_on_sigterm()
    torch.set_num_threads(1)
    commit = source_commit()
    trials = [_train(options, name, rate, TUNING_SEED) for name in OPTIMIZERS for rate in options.rates]
    best = {
        name: min((t for t in trials if t["optimizer"] == name), key=lambda trial: trial["held_out"][-1]["loss"])[
            "rate"
        ]
        for name in OPTIMIZERS
    }
    rows = [_train(options, name, best[name], seed) for seed in range(options.seeds) for name in OPTIMIZERS]
    settings = _settings(_config(options, BASELINE, best[BASELINE], 0))
    write_record(
        options.out, command=options.command, commit=commit, rows=rows, trials=trials, best=best, settings=settings
    )
    draw(options.out.with_suffix(".png"), rows)
    print(table(rows))


def windows_to_reach(held_out: Sequence[Mapping[str, float]], loss: float) -> float | None:
    """Windows after which a run's held-out loss is at most this for the first time, between two
    evaluations by a straight line; None if it never is.
    """
    if held_out[0]["loss"] <= loss:
        return held_out[0]["windows"]
    for before, after in pairwise(held_out):
        if after["loss"] <= loss:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return before["windows"] + share * (after["windows"] - before["windows"])
    return None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a seed: both final losses, and after what share of AdamW's windows Muon has its final
    loss.
    """
    lines, shares = [], []
    for seed in sorted({row["seed"] for row in rows}):
        runs = {row["optimizer"]: row["held_out"] for row in rows if row["seed"] == seed}
        last = runs[BASELINE][-1]
        reached = windows_to_reach(runs["muon"], last["loss"])
        shares.append(None if reached is None else reached / last["windows"])
        lines.append([str(seed), f"{last['loss']:.3f}", f"{runs['muon'][-1]['loss']:.3f}", _share(shares[-1])])
    known = [share for share in shares if share is not None]
    lines.append(["mean", "", "", _share(mean(known)) if len(known) == len(shares) else "not all"])
    return markdown(["seed", "AdamW: held-out loss, end", "Muon's", "windows for AdamW's, of AdamW's"], lines)


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Held-out loss against windows, a line a run."""
    with picture(path, 6.4, 3.6) as (_, (axes,)):
        for row in rows:
            first = row["seed"] == min(other["seed"] for other in rows)
            axes.plot(
                [point["windows"] for point in row["held_out"]],
                [point["loss"] for point in row["held_out"]],
                color=COLORS[OPTIMIZERS.index(row["optimizer"])],
                linewidth=1.2,
                label={"adamw": "AdamW", "muon": "Muon, AdamW for the rest"}[row["optimizer"]] if first else None,
            )
        axes.set_xlabel("windows")
        axes.set_ylabel("held-out loss, nats")
        axes.legend(frameon=False)


def _config(options: OptimizersOptions, name: str, rate: float, seed: int) -> RunConfig:
    overrides = [f"optimizer.name={name}", f"optimizer.lr={rate}", f"run.seed={seed}"]
    return load_config(RUN_FILE, [*(QUICK if options.quick else ()), *options.overrides, *overrides])


def _settings(config: RunConfig) -> dict[str, Any]:
    """What plays a part, of the run file of AdamW's first run; no path of this machine."""
    tree = config.model_dump(mode="json")
    tree["data"]["source"] = [Path(source).name for source in config.data.source]
    return {name: tree[name] for name in ("model", "tokenizer", "data", "window", "optimizer")} | {
        "windows": config.run.windows
    }


def _train(options: OptimizersOptions, name: str, rate: float, seed: int) -> dict[str, Any]:
    """One run: held-out loss every so many windows, and at the end."""
    config = _config(options, name, rate, seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        tokenizer, _ = prepare_text(config, run)
        shards = {
            path.parent.name: list(read_articles([str(path)])) for path in sorted(run.clients.glob("*/shard.jsonl"))
        }
        text = encode(read_articles([str(run.held_out)]), tokenizer, config.data.sequence_length)
    trainer = Centralized(config, tokenizer, shards)
    held_out = []
    for window in range(config.run.windows):
        trained = trainer.train_window(window)
        if (window + 1) % options.every == 0 or window + 1 == config.run.windows:
            loss = masked_lm_loss(trainer.model, tokenizer, text, seed=seed).loss
            held_out.append({"windows": window + 1, "loss": loss, "training_loss": trained.loss})
    row = {"optimizer": name, "rate": rate, "seed": seed, "seconds": time.monotonic() - began, "held_out": held_out}
    print(f"{name} {rate:g}, seed {seed}: {held_out[-1]['loss']:.3f} after {row['seconds']:.0f} s", flush=True)
    return row


def _share(share: float | None) -> str:
    return "never" if share is None else f"{100 * share:.0f} %"
