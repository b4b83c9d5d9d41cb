"""`python -m benchmarks.liars`: final held-out loss with liars among ten clients."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.liars.runs import COMBINE, RUN_FILE, Case, measure, prepare, unigram_loss
from fedbert_ds.bench.process import exit_on_sigterm
from fedbert_ds.run_file import load_config
from fedbert_ds.telemetry.record import source_commit, write_record
from fedbert_ds.telemetry.tables import markdown

LIARS = (0, 1, 3)
QUICK = ("run.windows=4", "run.save_every=4", "data.max_articles=40", "tokenizer.vocab_size=300", "window.tokens=640")
AVERAGES_ONLY = ("trimmed_mean", "krum")
"""Of gradients of client halves the median stands for them: most of the model is the body there."""
NAMES = {"synchronous": "`synchronous`", "whole": "`cut: whole`"}


@dataclass(frozen=True)
class LiarsOptions:
    """What a user gives the benchmark."""

    out: Path
    command: str
    work: Path
    modes: tuple[str, ...] = ("whole", "synchronous")
    combine: tuple[str, ...] = tuple(COMBINE)
    lies: tuple[str, ...] = ("flip",)
    quick: bool = False
    overrides: tuple[str, ...] = ()


def bench_liars(options: LiarsOptions) -> None:
    """Train every case and write the record; it is written after each, so that none is lost."""
    exit_on_sigterm()
    torch.set_num_threads(1)
    # Everything that ranks and clients import: they are forks of this process.
    import deepspeed  # noqa: F401

    import fedbert_ds.client.session
    import fedbert_ds.server.serve  # noqa: F401

    commit = source_commit()
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    overrides = (*(QUICK if options.quick else ()), *options.overrides)
    text = prepare(options.work, overrides)
    unigram = unigram_loss(text, overrides)
    tree = load_config(RUN_FILE, list(overrides)).model_dump(mode="json")
    settings = {name: tree[name] for name in ("model", "tokenizer", "data", "window", "optimizer")}
    settings |= {"windows": tree["run"]["windows"]}
    rows: list[dict[str, Any]] = []
    for case in cases(options):
        rows.append(measure(case, options.work, text, overrides))
        print(rows[-1], flush=True)
        write_record(
            options.out, command=options.command, commit=commit, rows=rows, unigram_loss=unigram, settings=settings
        )
    for mode in options.modes:
        for lie in options.lies:
            print(f"\n{mode}, {lie}\n\n{table(rows, mode, lie)}")


def cases(options: LiarsOptions) -> list[Case]:
    """Without liars there is one run of each, whatever the lie."""
    return [
        Case(mode, combine, liars, lie)
        for mode in options.modes
        for lie in options.lies
        for combine in options.combine
        for liars in LIARS
        if (liars or lie == options.lies[0]) and not (mode == "synchronous" and combine in AVERAGES_ONLY)
    ]


def table(rows: Sequence[Mapping[str, Any]], mode: str, lie: str) -> str:
    """A line for each way to combine: final held-out loss by the number of liars."""
    lines = []
    for combine in dict.fromkeys(row["combine"] for row in rows if row["mode"] == mode):
        of_it = [row for row in rows if (row["mode"], row["combine"]) == (mode, combine)]
        by_liars = {row["liars"]: row for row in of_it if row["lie"] == lie or not row["liars"]}
        lines.append([f"`{combine}`" if "," not in combine else combine, *(_loss(by_liars.get(n)) for n in LIARS)])
    return markdown([f"{NAMES[mode]}, {lie}", *(f"{n} liars of 10" if n != 1 else "1 liar" for n in LIARS)], lines)


def _loss(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return "not finite" if row["held_out_loss"] is None else f"{row['held_out_loss']:.2f}"
