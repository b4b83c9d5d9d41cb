"""Several processes over one text: each loads the model and computes a batch after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

SumOf = Callable[[Sequence[int]], float]
"""Of a batch, by numbers of its sequences: the sum of its cross-entropies."""

_sum_of: SumOf
"""In a worker."""


def in_processes(
    make: Callable[..., SumOf], arguments: Sequence[Any], batches: Iterable[Sequence[int]], devices: Sequence[str]
) -> Iterator[float]:
    """The sum of each batch, in order. A process for each of `devices` makes its function once, by
    `make(*arguments, device)`. Both must be picklable.
    """
    context = get_context("spawn")
    free: Any = context.Queue()
    for device in devices:
        free.put(device)
    threads = max(1, torch.get_num_threads() // len(devices))
    with ProcessPoolExecutor(len(devices), context, _begin, (make, tuple(arguments), free, threads)) as pool:
        yield from pool.map(_compute, batches)


def _begin(make: Callable[..., SumOf], arguments: tuple[Any, ...], free: Any, threads: int) -> None:
    global _sum_of
    torch.set_num_threads(threads)
    _sum_of = make(*arguments, free.get())


def _compute(batch: Sequence[int]) -> float:
    return _sum_of(batch)
