"""Ranks as threads of one process, whose collectives meet in it; parameters cut as by ZeRO."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from unittest import mock

import torch
from torch import Tensor

from fedbert_ds.model.partition import Partition, Shape, Slice

Result = TypeVar("Result")
WAIT = 30.0
"""Seconds for which a rank waits for the others."""


def run_ranks(count: int, run: Callable[[int], Result]) -> list[Result]:
    """`run(rank)` of so many ranks at once; what each returns."""
    ranks, barrier = threading.local(), threading.Barrier(count)
    posts: dict[int, Tensor | list[Tensor]] = {}

    def posted(mine: Tensor | list[Tensor]) -> list:
        posts[ranks.rank] = mine
        barrier.wait(WAIT)
        everyones = [posts[rank] for rank in range(count)]
        barrier.wait(WAIT)
        return everyones

    def all_reduce(tensor: Tensor) -> None:
        tensor.copy_(torch.stack(posted(tensor.clone())).sum(0))

    def all_to_all_single(output: Tensor, sent: Tensor, output_sizes: list[int], input_sizes: list[int]) -> None:
        assert sum(input_sizes) == len(sent) and sum(output_sizes) == len(output)
        come = [pieces[ranks.rank] for pieces in posted(list(sent.clone().split(input_sizes)))]
        assert [len(piece) for piece in come] == output_sizes
        output.copy_(torch.cat(come))

    def as_rank(rank: int) -> Result:
        ranks.rank = rank
        try:
            return run(rank)
        except BaseException:
            barrier.abort()
            raise

    with (
        mock.patch.object(torch.distributed, "all_reduce", all_reduce),
        mock.patch.object(torch.distributed, "all_to_all_single", all_to_all_single),
        ThreadPoolExecutor(count) as threads,
    ):
        return list(threads.map(as_rank, range(count)))


def end_to_end(shapes: Sequence[Shape], ranks: int) -> list[list[Slice]]:
    """Stages 1 and 2: parameters end to end, cut into equal parts; by rank."""
    part = math.ceil(sum(map(math.prod, shapes)) / ranks)
    slices: list[list[Slice]] = [[] for _ in range(ranks)]
    begins = 0
    for number, shape in enumerate(shapes):
        ends = begins + math.prod(shape)
        for rank in range(ranks):
            first, last = max(begins, rank * part), min(ends, (rank + 1) * part)
            if first < last:
                slices[rank].append(Slice(number, first - begins, first - rank * part, last - first))
        begins = ends
    return slices


def each_cut(shapes: Sequence[Shape], ranks: int) -> list[list[Slice]]:
    """Stage 3: every parameter cut into equal parts, these end to end, the last one shorter."""
    slices: list[list[Slice]] = [[] for _ in range(ranks)]
    offset = 0
    for number, shape in enumerate(shapes):
        size = math.prod(shape)
        part = math.ceil(size / ranks)
        for rank in range(ranks):
            if (length := min(part, size - rank * part)) > 0:
                slices[rank].append(Slice(number, rank * part, offset, length))
        offset += part
    return slices


CUTS = {"end to end": end_to_end, "each cut": each_cut}


def partition(cut: str, shapes: Sequence[Shape], rank: int, ranks: int) -> tuple[Partition, int]:
    """This rank's, and how long its flat tensor is."""
    slices = CUTS[cut](shapes, ranks)
    length = max(part.offset + part.length for of_rank in slices for part in of_rank)
    return Partition(shapes, slices, rank, torch.device("cpu")), length


def flat_of(tensors: Sequence[Tensor], where: Partition, length: int, padding: float = 0.0) -> Tensor:
    """What this rank has of whole tensors."""
    flat = torch.full((length,), padding, dtype=tensors[0].dtype)
    for part in where.own:
        piece = tensors[part.parameter].reshape(-1)[part.start : part.start + part.length]
        flat[part.offset : part.offset + part.length] = piece
    return flat


def whole_of(flats: Sequence[Tensor], where: Partition) -> list[Tensor]:
    """Whole tensors from what all ranks have."""
    tensors = [torch.full(tuple(shape), torch.nan, dtype=flats[0].dtype) for shape in where.shapes]
    for flat, slices in zip(flats, where.slices, strict=True):
        for part in slices:
            piece = flat[part.offset : part.offset + part.length]
            tensors[part.parameter].view(-1)[part.start : part.start + part.length] = piece
    return tensors
