"""`python -m benchmarks.large_text`: the most memory a client holds of a text of many gigabytes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.memory.benchmark import fill
from benchmarks.memory.client import PHASES
from benchmarks.memory.runs import BASE, QUICK, RUN_FILE, Case, measure
from fedbert_ds.atomic_write import atomic_write
from fedbert_ds.bench.process import LONGEST_SECONDS, exit_on_sigterm
from fedbert_ds.bench.text import prepare
from fedbert_ds.data.corpus import read_articles
from fedbert_ds.errors import ConfigError
from fedbert_ds.run_file import load_config
from fedbert_ds.seeding import generator
from fedbert_ds.telemetry.record import source_commit, write_record
from fedbert_ds.telemetry.tables import markdown

CASE = Case(BASE, "synchronous", "int8")
QUICK_GIGABYTES = 0.02
SECONDS_A_GIGABYTE = 3600
"""On two slow cores a client reads and tokenizes a gigabyte in a third of it."""
SENTENCES = 40
"""Of an article."""
SHOWN = ("start", "plan", "embed", "head", "optimizer step", "between")
"""Phases with a column of their own."""


@dataclass(frozen=True)
class LargeTextOptions:
    """What a user gives the benchmark."""

    out: Path
    command: str
    work: Path = Path("runs/bench-large-text")
    quick: bool = False
    gigabytes: float = 10.0
    """Of 10^9 bytes."""
    overrides: tuple[str, ...] = ()


def bench_large_text(options: LargeTextOptions) -> None:
    """Write a text, let a client train on it twice, print and record its peaks.

    ConfigError if the disk has no room, UserError names a failed run's log.
    """
    exit_on_sigterm()
    size = int(1e9 * (QUICK_GIGABYTES if options.quick else options.gigabytes))
    options.work.mkdir(parents=True, exist_ok=True)
    # Its tokens take about as much again.
    if shutil.disk_usage(options.work).free < 2.5 * size:
        raise ConfigError(f"--work {options.work}: {2.5 * size / 1e9:.1f} GB are needed there; name another folder")
    overrides = (*(QUICK if options.quick else ()), *options.overrides)
    config = load_config(RUN_FILE, overrides)
    _, tokenizer = prepare(config, options.work / ("quick" if options.quick else "words"), 1)
    fill(tokenizer, config.tokenizer.vocab_size)
    text = options.work / "text.jsonl"
    write_large(text, size)
    commit = source_commit()
    # The server waits for the tokenizing, too.
    overrides = (*overrides, f"tokenizer.path={tokenizer.resolve()}", "clients.join_timeout=100000")
    longest_seconds = LONGEST_SECONDS + SECONDS_A_GIGABYTE * size / 1e9
    rows = []
    try:
        for row in measure(CASE, options.work, text, overrides, longest_seconds):
            log = options.work / f"{CASE.slug}.{row['begins']}.client.log"
            rows.append(row | {"bytes": text.stat().st_size} | facts_of(log.read_text(encoding="utf-8")))
            print(f"{row['begins']}: {row['peak_mb']:.0f} MB, {row['phases']}", flush=True)
    finally:
        text.unlink(missing_ok=True)
        shutil.rmtree(options.work / f"{CASE.slug}.state", ignore_errors=True)
    settings = {"vocab_size": config.tokenizer.vocab_size, "sequence_length": config.data.sequence_length}
    write_record(options.out, command=options.command, commit=commit, rows=rows, settings=settings)
    print(f"\n{table(rows)}\n\nrecord  {options.out}", flush=True)


def write_large(path: Path, size: int) -> None:
    """Write at least `size` bytes of .jsonl: articles of sentences of Python's documentation, drawn
    at random by a seed.
    """
    text = " ".join(article.text for article in read_articles(["python-docs"]))
    sentences = re.split(r"(?<=[.:]) ", " ".join(text.split()))
    random, written = generator("large text"), 0
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        while written < size:
            drawn = random.integers(len(sentences), size=SENTENCES)
            written += file.write(json.dumps({"text": " ".join(sentences[one] for one in drawn)}) + "\n")


def facts_of(log: str) -> dict[str, int]:
    """Articles, tokens and sequences, as a client's log tells them."""
    found = re.search(r"([\d,]+) articles, .*?([\d,]+) tokens in ([\d,]+) sequences", log, re.DOTALL)
    if found is None:
        return {}
    numbers = (int(number.replace(",", "")) for number in found.groups())
    return dict(zip(("articles", "tokens", "sequences"), numbers, strict=True))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Peaks, MB (1e6 bytes), and minutes from start to end."""
    heads = ["client", "text, GB", "million tokens", "thousand sequences", "minutes", "peak, MB", *SHOWN]
    cells = [
        [
            row["begins"],
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['tokens'] / 1e6:,.0f}",
            f"{row['sequences'] / 1e3:,.0f}",
            f"{row['seconds'] / 60:.1f}",
            f"{row['peak_mb']:,.0f}",
            *(f"{row['phases'][name]:,.0f}" for name in SHOWN),
        ]
        for row in rows
    ]
    return markdown(heads, cells)


assert set(SHOWN) <= set(PHASES)
