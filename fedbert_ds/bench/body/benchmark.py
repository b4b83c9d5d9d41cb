"""`fedbert-ds bench body`: training steps of BERT encoders, packed beside plain transformers.

A step is forward, backward and optimizer step of one window: sequences of one length, or sentences
of a text. A GPU trains BERT-base and BERT-large in bf16, a CPU a small BERT in fp32. The ways take
turns in one process with a dense matrix product, whose rate divides the model's FLOP/s (MFU). Of a
card whose nominal peak is known, the share of that is told, too: no product reaches it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedbert_ds.bench.body.encoders import Shape, Step, Window, has_flash_attn, packed_step, padded_step, varlen_step
from fedbert_ds.bench.device import default_device, describe, peak_memory, time_side_by_side
from fedbert_ds.bench.lengths import sentence_lengths
from fedbert_ds.config import Kernels
from fedbert_ds.errors import ConfigError
from fedbert_ds.model.kernels import check_kernels
from fedbert_ds.server.body.peak import matmul, nominal_rate
from fedbert_ds.telemetry.plots import COLORS, PALE, picture, short_ticks
from fedbert_ds.telemetry.record import source_commit, write_record
from fedbert_ds.telemetry.tables import markdown

BASE = Shape("BERT-base", layers=12, hidden_size=768, heads=12)
LARGE = Shape("BERT-large", layers=24, hidden_size=1024, heads=16)
SMALL = Shape("BERT 4 x 256", layers=4, hidden_size=256, heads=4)
TINY = Shape("BERT 2 x 64", layers=2, hidden_size=64, heads=2)

OURS = "packed (this body)"
PADDED = "transformers, padded"
BY_LENGTH = "transformers, padded, sorted by length"
COMPILED = "transformers, padded, torch.compile"
VARLEN = "transformers, varlen of torch (no attention dropout)"
FLASH = "transformers, varlen of flash-attn"
SENTENCES = "sentences"
PRODUCT = "matrix product"


@dataclass(frozen=True)
class BodyOptions:
    """What a user gives the benchmark."""

    out: Path
    """The record; its picture lies beside it as .png."""
    command: str
    """What the user typed, for the record."""
    data: str = "python-docs"
    """Source of the sentences; see data.source of the run file."""
    dropout: float = 0.1
    """Of hidden states and of attention probabilities."""
    kernels: Kernels = "auto"
    """As in the run file."""
    rounds: int = 7
    """Measurements of each way; their median counts."""
    quick: bool = False


@dataclass(frozen=True)
class Plan:
    """What is measured on a device."""

    shapes: tuple[Shape, ...]
    dtype: torch.dtype
    equal_lengths: tuple[int, ...]
    window: int
    """Tokens of a window."""
    micro_batch: int
    """Most tokens of a micro-batch, padding included."""
    longest: int
    """Longest sentence; longer ones are cut in pieces."""


GPU_PLAN = Plan((BASE, LARGE), torch.bfloat16, (128, 512), 65_536, 16_384, 512)
CPU_PLAN = Plan((SMALL,), torch.float32, (64, 128), 8192, 2048, 128)
QUICK_PLAN = Plan((TINY,), torch.float32, (32,), 1024, 512, 64)


def bench_body(options: BodyOptions) -> None:
    """Measure, write record and picture, print the table. UserError without text or kernels."""
    device = default_device()
    check_kernels(options.kernels, device)
    if not 0.0 <= options.dropout < 1.0:
        raise ConfigError(f"--dropout {options.dropout:g}: must be at least 0 and below 1")
    if options.rounds < 1:
        raise ConfigError(f"--rounds {options.rounds}: at least 1 is needed")
    plan = QUICK_PLAN if options.quick else GPU_PLAN if device.type == "cuda" else CPU_PLAN
    commit = source_commit()
    sentences = sentence_lengths(options.data, plan.longest)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for shape in plan.shapes:
        for name, lengths in mixes(plan, sentences).items():
            window = Window.draw(lengths, shape.hidden_size, device, plan.dtype)
            measured = _measure(shape, name, window, plan, options, device, left_out)
            print(f"{table(measured)}\n", flush=True)
            rows += measured
    write_record(
        options.out,
        command=options.command,
        commit=commit,
        rows=rows,
        device=describe(device),
        settings={
            "dtype": str(plan.dtype).removeprefix("torch."),
            "dropout": options.dropout,
            "kernels": options.kernels,
            "window_tokens": plan.window,
            "micro_batch_tokens": plan.micro_batch,
            "rounds": options.rounds,
        },
        text=_text_facts(options.data, sentences),
        left_out=left_out,
    )
    drawn = options.out.with_suffix(".png")
    draw(drawn, rows)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    print(f"record  {options.out}\npicture {drawn}", flush=True)


def mixes(plan: Plan, sentences: Sequence[int]) -> dict[str, list[int]]:
    """{name of a mix: lengths of a window's sequences}: all equal, or sentences of the text."""
    mixes = {f"all {length}": [length] * (plan.window // length) for length in plan.equal_lengths}
    drawn = random.Random(1).sample(list(sentences), len(sentences))
    mixes[SENTENCES] = []
    for length in drawn:
        if sum(mixes[SENTENCES]) + length > plan.window:
            break
        mixes[SENTENCES].append(length)
    return mixes


def ways(
    shape: Shape, window: Window, plan: Plan, options: BodyOptions, device: torch.device
) -> dict[str, Callable[[], Step]]:
    """What makes the step of each way that can be tried here."""
    common = (shape, window, plan.micro_batch, options.dropout)
    found: dict[str, Callable[[], Step]] = {
        OURS: lambda: packed_step(*common, options.kernels, device),
        PADDED: lambda: padded_step(*common, device),
        COMPILED: lambda: padded_step(*common, device, compiled=True),
    }
    if len(set(window.lengths)) > 1:
        found[BY_LENGTH] = lambda: padded_step(*common, device, by_length=True)
    if device.type == "cuda":
        found[FLASH if has_flash_attn() else VARLEN] = lambda: varlen_step(*common, device)
    if options.quick:
        # Compiling takes longer than all the rest.
        del found[COMPILED]
    return found


def _measure(
    shape: Shape,
    mix: str,
    window: Window,
    plan: Plan,
    options: BodyOptions,
    device: torch.device,
    left_out: dict[str, str],
) -> list[dict[str, Any]]:
    """A row for each way; those that fail at their first step are told in `left_out`."""
    steps: dict[str, Step] = {}
    memory: dict[str, int | None] = {}
    for name, make in ways(shape, window, plan, options, device).items():
        try:
            step = make()
            step.run()
            memory[name] = peak_memory(step.run, device)
        except (RuntimeError, ImportError) as error:
            if name in (OURS, PADDED):
                raise
            # No compiler, a card too old for the kernel, or too little memory: the others go on.
            left_out[f"{name} ({shape.name}, {mix})"] = str(error).strip().partition("\n")[0]
            continue
        steps[name] = step
    product, product_flops = matmul(device, plan.dtype)
    timings = time_side_by_side(
        {**{name: step.run for name, step in steps.items()}, PRODUCT: product}, device, options.rounds
    )
    rate = product_flops / timings[PRODUCT].median
    nominal = nominal_rate(device, plan.dtype)
    return [
        {
            "model": shape.name,
            "lengths": mix,
            "way": name,
            "tokens": window.num_tokens,
            "sequences": len(window.lengths),
            "computed_tokens": step.computed_tokens,
            "seconds": timings[name].median,
            "fastest": timings[name].fastest,
            "slowest": timings[name].slowest,
            "tokens_per_second": window.num_tokens / timings[name].median,
            "beside_padded": timings[PADDED].median / timings[name].median,
            "flops_per_second": step.flops / timings[name].median,
            "matmul_flops_per_second": rate,
            "mfu": step.flops / timings[name].median / rate,
            "share_of_nominal": step.flops / timings[name].median / nominal if nominal else None,
            "peak_memory_bytes": memory[name],
        }
        for name, step in steps.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    heads = ["model", "lengths", "way", "real tokens/s", "beside padded", "MFU", "tokens computed / real"]
    cells = [
        [
            row["model"],
            row["lengths"],
            row["way"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['beside_padded']:.2f}x",
            f"{100 * row['mfu']:.0f} %",
            f"{row['computed_tokens'] / row['tokens']:.2f}",
        ]
        for row in rows
    ]
    shares = [row.get("share_of_nominal") for row in rows]
    if any(shares):
        heads.append("of the card's peak")
        cells = [[*line, f"{100 * share:.0f} %" if share else "-"] for line, share in zip(cells, shares, strict=True)]
    return markdown(heads, cells, words=3)


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Real tokens/s: a panel a model, a group of bars a mix of lengths, a colour a way."""
    models, mixes, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "lengths", "way"))
    width = 0.8 / len(names)
    colors = dict(zip(names, (COLORS[0], PALE, *COLORS[1:]), strict=False))
    with picture(path, 8, 1 + 3 * len(models), rows=len(models), grid="y") as (figure, panels):
        for axes, model in zip(panels, models, strict=True):
            for number, name in enumerate(names):
                chosen = [row for row in rows if row["model"] == model and row["way"] == name]
                places = [mixes.index(row["lengths"]) + (number - (len(names) - 1) / 2) * width for row in chosen]
                heights = [row["tokens_per_second"] for row in chosen]
                bars = axes.bar(places, heights, width * 0.92, label=name, color=colors[name])
                axes.bar_label(bars, [f"{row['beside_padded']:.2f}x" for row in chosen], fontsize=7, padding=1)
            axes.set_title(model, loc="left", fontsize=10)
            axes.set_ylabel("real tokens/s")
            short_ticks(axes.yaxis)
            axes.set_xticks(range(len(mixes)), mixes)
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)


def _text_facts(source: str, sentences: Sequence[int]) -> dict[str, Any]:
    ordered = sorted(sentences)
    return {
        "source": Path(source).name,
        "sentences": len(ordered),
        "mean_length": round(sum(ordered) / len(ordered), 1),
        "median_length": ordered[len(ordered) // 2],
        "longest": ordered[-1],
    }
