"""`python -m benchmarks.fp8`: what fp8 matrix products cost in loss, beside bf16 and fp32.

The same small model on the same text, trained in one process on the CPU; weights are fp32 and
products as named. torchao emulates fp8 there: its rounding, not its speed. Whoever has no torchao
gets one line that says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.codecs.runs import Text, settings_of
from benchmarks.codecs.settings import RUN_FILE
from benchmarks.codecs.split_training import SplitTrainer
from fedbert_ds.bench.text import batches_of
from fedbert_ds.config import RunConfig, WireSection
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import split
from fedbert_ds.model.fp8 import check_fp8, install_fp8
from fedbert_ds.run_file import load_config
from fedbert_ds.telemetry.record import source_commit, write_record
from fedbert_ds.telemetry.tables import markdown

CPU = torch.device("cpu")
PRODUCTS = ("fp32", "bf16", "fp8")
TRAINED = (
    "model.num_hidden_layers=4", "model.dropout=0.0", "model.initializer_range=0.05", "run.windows=150",
    "window.tokens=2048", "window.tokens_per_micro_batch=2048", "optimizer.lr=1e-3", "optimizer.warmup_windows=15",
)  # fmt: skip
"""Over the default run file. Three of the four layers multiply in fp8."""
QUICK = ("run.windows=3", "tokenizer.vocab_size=500", "window.tokens=512", "optimizer.warmup_windows=1")


@dataclass(frozen=True)
class Fp8Options:
    """What a user gives the benchmark."""

    out: Path
    """The record."""
    command: str
    """What the user typed, for the record."""
    data: str = "python-docs"
    """Source of the articles; see data.source of the run file."""
    seeds: int = 2
    quick: bool = False
    overrides: tuple[str, ...] = ()


def bench_fp8(options: Fp8Options) -> None:
    """Train with each kind of products and seed, write the record, print the table.

    ConfigError without torchao.
    """
    check_fp8(CPU)
    torch.set_num_threads(1)
    quick = QUICK if options.quick else ()
    config = load_config(RUN_FILE, (*TRAINED, *quick, *options.overrides, f'data.source=["{options.data}"]'))
    commit, text, rows = source_commit(), Text(config, options.quick), []
    for row in runs(config, text, 1 if options.quick else options.seeds):
        print(f"{row['products']}, seed {row['seed']}: held-out loss {row['held_out_loss']:.4f}", flush=True)
        rows.append(row)
    write_record(
        options.out,
        command=options.command,
        commit=commit,
        rows=rows,
        settings=settings_of(config),
        text={"source": Path(options.data).name, "sha256": text.digest, "unigram_loss": text.unigram_loss(config)},
        torchao=_release(),
    )
    print(f"\n{table(rows)}\n\nrecord  {options.out}", flush=True)


def runs(config: RunConfig, text: Text, seeds: int) -> Iterator[dict[str, Any]]:
    """A row of each seed and kind of products."""
    for seed in range(1, seeds + 1):
        for products in PRODUCTS:
            yield {"products": products, "seed": seed, "held_out_loss": train(products, seed, config, text)}


def train(products: str, seed: int, config: RunConfig, text: Text) -> float:
    """Held-out loss, nats, after training from scratch with these products in the body."""
    model: Any = build_model(config.model, len(text.tokenizer), text.tokenizer.pad_token_id, seed)
    half, body = split(model, "embeddings")
    if products == "fp8":
        install_fp8(body, CPU)
    plain = body.forward

    def forward(*arguments: Any) -> torch.Tensor:
        narrow = nullcontext() if products == "fp32" else torch.autocast("cpu", torch.bfloat16)
        with narrow:
            return plain(*arguments).float()

    body.forward = forward  # type: ignore[assignment]
    trainer = SplitTrainer(half, body, WireSection(compression="none"), config.optimizer, config.run.windows, seed)
    batches = batches_of(config, text.train, text.tokenizer, "bench", seed)
    for window in range(config.run.windows):
        trainer.train_window(window, batches.next_batch(window, config.window.tokens))
    return trainer.loss(text.held_out_batches(config))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean held-out loss of each kind of products, and its distance from bf16's, seed by seed."""
    losses = {kind: {row["seed"]: row["held_out_loss"] for row in rows if row["products"] == kind} for kind in PRODUCTS}
    cells = []
    for kind, of_seeds in losses.items():
        apart = [loss - losses["bf16"][seed] for seed, loss in of_seeds.items()]
        distances = "" if kind == "bf16" else ", ".join(f"{one:+.4f}" for one in apart)
        cells.append([kind, f"{statistics.mean(of_seeds.values()):.4f}", distances])
    return markdown(["products of", "held-out loss, nats", "minus that of bf16, by seed"], cells, words=1)


def _release() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torchao")
    except PackageNotFoundError:
        return "unknown"
