"""Times launch shapes of the attention kernels on this card and keeps the fastest; needs a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedbert_kernels.attention import launch_backward, launch_forward
from fedbert_kernels.attention_launches import (
    KERNELS,
    capability,
    card_index,
    kernels_digest,
    launches,
    shape_class,
    tuned,
    tuned_path,
)
from fedbert_kernels.launch import Launch, fastest, write_table

TOLERANCE = 0.02
"""Largest difference to the default launch's result over its largest value: rounding only."""

Measure = Callable[[Callable[[], object]], float]


def candidates(default: Launch) -> Iterator[Launch]:
    """Launches to try in place of `default`, which comes first."""
    yield default
    for rows, columns, warps, stages in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)):
        # Fewer than 8 rows a warp leave tensor cores idle; more than 64 scores a thread spill.
        if rows >= 8 * warps and rows * columns <= 64 * 32 * warps:
            yield replace(default, rows=rows, columns=columns, warps=warps, stages=stages)


def tune(
    lengths: Sequence[int],
    heads: int,
    d: int,
    dtype: torch.dtype,
    dropout: float,
    device: torch.device,
    sliding_window: int | None = None,
) -> dict[str, tuple[Launch, float]]:
    """{kernel and shape class: (fastest launch, its share of the written one's time)}.

    For sequences of these lengths. Also writes them into the card's file; this process uses them
    from now on.
    """
    index = card_index(device)
    shape = shape_class(dtype, d, dropout > 0.0, sliding_window is not None, sum(lengths), len(lengths))
    written = launches(d, dtype, sliding_window is not None, capability(index))
    with torch.cuda.device(index):
        found = choose_all(lengths, heads, d, dtype, dropout, sliding_window, written, _device_time)
    named = {f"{kernel} {shape}": choice for kernel, choice in zip(KERNELS, found, strict=True)}
    write_table(tuned_path(index), kernels_digest(), {name: launch for name, (launch, _) in named.items()})
    tuned.cache_clear()
    return named


def choose_all(
    lengths: Sequence[int],
    heads: int,
    d: int,
    dtype: torch.dtype,
    dropout: float,
    sliding_window: int | None,
    written: tuple[Launch, Launch, Launch],
    measure: Measure,
    device: str = "cuda",
) -> list[tuple[Launch, float]]:
    """(fastest launch, its share of the written one's time) of each kernel.

    A backward kernel is timed together with the other one.
    """
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, heads, d, generator=generator).to(device, dtype)
    dout = torch.randn(sum(lengths), heads, d, generator=generator).to(device, dtype)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    seed = torch.tensor([1, 0], device=device) if dropout else None
    options = (cu_seqlens, seed, dropout, -1 if sliding_window is None else sliding_window, d**-0.5)
    forward, backward_q, backward_kv = written
    q, k, v = qkv.unbind(1)
    out, lse = launch_forward(q, k, v, *options, forward)

    def run_backward(launch_q: Launch, launch_kv: Launch) -> Tensor:
        dqkv = torch.empty_like(qkv)
        dq, dk, dv = dqkv.unbind(1)
        launch_backward(dout, q, k, v, out, lse, dq, dk, dv, *options, (launch_q, launch_kv))
        return dqkv

    choice = _choose(forward, lambda launch: launch_forward(q, k, v, *options, launch)[0], measure)
    choice_q = _choose(backward_q, lambda launch: run_backward(launch, backward_kv), measure)
    choice_kv = _choose(backward_kv, lambda launch: run_backward(choice_q[0], launch), measure)
    return [choice, choice_q, choice_kv]


def _choose(default: Launch, run: Callable[[Launch], Tensor], measure: Measure) -> tuple[Launch, float]:
    expected = run(default).float()

    def seconds(launch: Launch) -> float:
        result = run(launch).float()
        # Catches NaN, for which every comparison is false.
        if not bool((result - expected).abs().max() <= TOLERANCE * expected.abs().max()):
            raise ValueError(f"{launch}: not the default's result")
        return measure(lambda: run(launch))

    return fastest(default, candidates(default), seconds)


def _device_time(call: Callable[[], object]) -> float:
    """Milliseconds of a call: median of many, with cold caches."""
    from triton.testing import do_bench

    time: float = do_bench(call, return_mode="median")
    return time
