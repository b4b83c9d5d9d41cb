"""`python -m benchmarks.memory`: the most memory a client process holds, in each phase of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.memory.client import PHASES
from benchmarks.memory.runs import CASES, QUICK, RUN_FILE, measure
from fedbert_ds.bench.process import exit_on_sigterm
from fedbert_ds.bench.text import prepare
from fedbert_ds.data.tokenizer import load_tokenizer
from fedbert_ds.run_file import load_config
from fedbert_ds.telemetry.record import source_commit, write_record
from fedbert_ds.telemetry.tables import markdown


@dataclass(frozen=True)
class MemoryOptions:
    """What a user gives the benchmark."""

    out: Path
    command: str
    work: Path = Path("runs/bench-memory")
    quick: bool = False
    only: tuple[str, ...] = ()
    """Models to measure; empty for all."""
    overrides: tuple[str, ...] = ()


def bench_memory(options: MemoryOptions) -> None:
    """Run every case and print its peak, write the record. UserError names a failed run's log."""
    exit_on_sigterm()
    options.work.mkdir(parents=True, exist_ok=True)
    overrides = (*(QUICK if options.quick else ()), *options.overrides)
    config = load_config(RUN_FILE, overrides)
    shards, tokenizer = prepare(config, options.work / ("quick" if options.quick else "text"), 1)
    (shard,) = sorted(shards.glob("*.jsonl"))
    fill(tokenizer, config.tokenizer.vocab_size)
    overrides = (*overrides, f"tokenizer.path={tokenizer.resolve()}")
    commit, rows = source_commit(), []
    for case in CASES:
        if options.only and case.model not in options.only:
            continue
        for row in measure(case, options.work, shard, overrides):
            rows.append(row)
            print(f"{case.slug}, {row['begins']}: {row['peak_mb']:.0f} MB, {row['phases']}", flush=True)
    write_record(
        options.out,
        command=options.command,
        commit=commit,
        rows=rows,
        settings={
            "vocab_size": config.tokenizer.vocab_size,
            "sequence_length": config.data.sequence_length,
            "window_tokens": config.window.tokens,
            "micro_batch_tokens": config.window.tokens_per_micro_batch,
            "optimizer": config.optimizer.name,
            "cut": "embeddings",
        },
    )
    print(f"\n{table(rows)}\n\nrecord  {options.out}", flush=True)


def fill(folder: Path, vocab_size: int) -> None:
    """Give the tokenizer in `folder` unused pieces up to `vocab_size`: the text may hold fewer."""
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens([f"[unused{number}]" for number in range(vocab_size - len(tokenizer))])
    tokenizer.save_pretrained(folder)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Peaks by phase, MB (1e6 bytes); the phase with the most is bold."""
    phases = [name for name in PHASES if any(name in row["phases"] for row in rows)]
    heads = ["model", "mode", "updates", "client", "peak, MB", *phases]
    cells = []
    for row in rows:
        found = [row["phases"].get(name) for name in phases]
        cells.append(
            [row["model"], row["mode"], row["updates"], row["begins"], f"{row['peak_mb']:,.0f}"]
            + [
                "" if peak is None else f"**{peak:,.0f}**" if peak == row["peak_mb"] else f"{peak:,.0f}"
                for peak in found
            ]
        )
    return markdown(heads, cells, words=4)
