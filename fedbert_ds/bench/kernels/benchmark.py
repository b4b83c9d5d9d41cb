"""`fedbert-ds bench kernels`: every fused kernel beside torch's own operators.

On a GPU ours are Triton's; on a CPU they are the same operators' CPU bodies, in plain torch, and
the record says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedbert_ds.bench.device import default_device, describe, matmul_rate, memory_bandwidth
from fedbert_ds.bench.kernels.attention import PADDED_BATCH, attention_problem, draw_lengths
from fedbert_ds.bench.kernels.problem import TOLERANCES, Build, Problem, measure
from fedbert_ds.bench.kernels.report import draw, table
from fedbert_ds.bench.kernels.rows import (
    codec_problems,
    gelu_problem,
    layer_norm_problem,
    loss_problem,
)
from fedbert_ds.bench.kernels.tuning import choose_ways, tune_launches
from fedbert_ds.bench.lengths import article_lengths, sentence_lengths
from fedbert_ds.errors import RunError
from fedbert_ds.telemetry.record import source_commit, write_record

KERNELS = ("attention", "layer norm", "GELU", "linear + cross-entropy", "codecs")
CODECS = ("int8", "int8_group", "fp8_e4m3", "int4_hadamard")
QUICK_SENTENCES = (24, 11, 35, 8, 19, 42, 27, 14, 6, 31, 22, 17, 53, 9, 28, 12, 20, 38, 15, 25)
"""Lengths as of Python's documentation, for `quick`: counting real ones takes longest of all."""


@dataclass(frozen=True)
class KernelsOptions:
    """What a user gives the benchmark."""

    out: Path
    """The record; its picture lies beside it as .png."""
    command: str
    """What the user typed, for the record."""
    data: str = "python-docs"
    """Text of the real mixes of lengths; see data.source of the run file."""
    kernels: tuple[str, ...] = KERNELS
    tune: bool = False
    """First time attention's launch shapes, then attention, LayerNorm and GELU beside their rivals
    on this card; later runs take the fastest."""
    quick: bool = False


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    tokens: int
    heads_and_sizes: tuple[tuple[int, int], ...]
    """Of attention: (heads, head size)."""
    widths: tuple[int, ...]
    """Hidden sizes; GELU's is four times as wide."""
    vocabulary: int
    rounds: int
    seconds: float
    """Of one measurement."""


Further = Callable[[Problem, bool], Mapping[str, Build]]

GPU = Sizes(32_768, ((12, 64), (8, 128)), (768, 1024), 30_522, rounds=7, seconds=0.05)
QUICK_GPU = Sizes(8_192, ((12, 64),), (768,), 30_522, rounds=3, seconds=0.01)
CPU = Sizes(4_096, ((4, 64),), (256,), 30_522, rounds=5, seconds=0.1)
QUICK_CPU = Sizes(512, ((2, 64),), (256,), 2_000, rounds=3, seconds=0.01)


def bench_kernels(
    options: KernelsOptions, device: torch.device | None = None, more: Further = lambda problem, compiled: {}
) -> None:
    """Measure, then write record and picture and print the table.

    `more` names further ways to compute a problem, those that torch.compile makes only if its
    second argument is true. RunError if tuning is asked for where no kernel of Triton's runs;
    DataError for a text that cannot be read.
    """
    device = device or default_device()
    on_gpu = device.type == "cuda"
    sizes = {(True, False): GPU, (True, True): QUICK_GPU, (False, False): CPU, (False, True): QUICK_CPU}[
        on_gpu, options.quick
    ]
    dtype = torch.bfloat16 if on_gpu else torch.float32
    commit = source_commit()
    if options.tune and not _has_triton(device):
        raise RunError("--tune needs a GPU and the triton package; drop it, elsewhere there is nothing to tune")
    mixes = mixes_of(options, sizes.tokens) if "attention" in options.kernels else {}
    tuned = tune_launches(mixes, sizes.heads_and_sizes, dtype, device) if options.tune else []
    choices: list[dict[str, Any]] = []
    if options.tune:
        choices = choose_ways(options.kernels, sizes.heads_and_sizes, sizes.widths, dtype, device)
    peaks = {"TFLOP/s": matmul_rate(device, dtype), "GB/s": memory_bandwidth(device)}
    rows: list[dict[str, Any]] = []
    for problem in problems(options, sizes, mixes, dtype, device):
        dropout = f", dropout {problem.dropout}" if problem.dropout else ""
        print(f"{problem.kernel}, {problem.case}{dropout}", flush=True)
        problem = replace(problem, ways={**problem.ways, **more(problem, not options.quick)})
        rows += measure(problem, device, peaks[problem.unit], sizes.rounds, sizes.seconds)
    write_record(
        options.out,
        command=options.command,
        commit=commit,
        rows=rows,
        device=describe(device),
        compares=compares(device),
        settings={
            **asdict(sizes), "dtype": str(dtype).removeprefix("torch."), "data": _name(options),
            "padded_batch": PADDED_BATCH, "tolerance": TOLERANCES[dtype],
        },
        measured_peaks={"TFLOP/s": peaks["TFLOP/s"] / 1e12, "GB/s": peaks["GB/s"] / 1e9},
        tuned=tuned,
        choices=choices,
        extras=_extras(),
    )  # fmt: skip
    drawn = options.out.with_suffix(".png")
    draw(drawn, rows)
    print(f"\n{compares(device)}\n\n{table(rows)}\n\nrecord  {options.out}\npicture {drawn}", flush=True)


def compares(device: torch.device) -> str:
    """What `ours` is on this device."""
    if _has_triton(device):
        return f"Ours: Triton kernels on {describe(device)['device']}."
    return "Ours: the operators' own bodies in plain torch, which run where Triton's kernels do not; no GPU was used."


def problems(
    options: KernelsOptions,
    sizes: Sizes,
    mixes: dict[str, list[int]],
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Problem]:
    """One after another, as each holds its tensors."""
    compiled = not options.quick
    rows = sizes.tokens
    for kernel in options.kernels:
        if kernel == "attention":
            for heads, head_size in sizes.heads_and_sizes:
                for case, lengths in mixes.items():
                    for dropout in (0.0, 0.1):
                        yield attention_problem(case, lengths, heads, head_size, dtype, dropout, device, compiled)
        for width in sizes.widths:
            if kernel == "layer norm":
                for dropout in (0.0, 0.1):
                    yield layer_norm_problem(rows, width, dtype, dropout, device, compiled)
            elif kernel == "GELU":
                yield gelu_problem(rows, 4 * width, dtype, device, compiled)
            elif kernel == "linear + cross-entropy":
                # 15 % of the tokens are masked.
                yield loss_problem(rows * 15 // 100, width, sizes.vocabulary, dtype, device, compiled)
        if kernel == "codecs":
            for codec in CODECS:
                yield from codec_problems(codec, rows, sizes.widths[0], dtype, device, compiled)


def mixes_of(options: KernelsOptions, tokens: int) -> dict[str, list[int]]:
    """{name: lengths}, each of about `tokens` tokens."""
    mixes = {f"all {length}": [length] * max(1, tokens // length) for length in (128, 512)}
    if options.quick:
        return mixes | {"sentences": draw_lengths(QUICK_SENTENCES, tokens)}
    print(f"counting tokens of {options.data}", flush=True)
    return mixes | {
        "sentences": draw_lengths(sentence_lengths(options.data), tokens),
        "articles": draw_lengths(article_lengths(options.data), tokens),
    }


def _has_triton(device: torch.device) -> bool:
    from fedbert_kernels.interpreter import HAVE_TRITON

    return bool(HAVE_TRITON) and device.type == "cuda"


def _extras() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for package in ("triton", "flash-attn", "liger-kernel"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _name(options: KernelsOptions) -> str | None:
    # A file's name says what it is; where it lies on this machine is nobody's business.
    return None if options.quick else Path(options.data).name


def parse_kernels(names: Iterable[str]) -> tuple[str, ...]:
    """The kernels named, all of them if none is. RunError for an unknown name."""
    chosen = tuple(names) or KERNELS
    for name in chosen:
        if name not in KERNELS:
            raise RunError(f"--kernel {name}: choose among {', '.join(KERNELS)}")
    return chosen
