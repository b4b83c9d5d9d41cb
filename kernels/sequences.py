"""Packed sequences as work: checked bounds, tiles for kernels, batches of equal length for SDPA.

All of it follows from `cu_seqlens` ([n + 1] int32: sequence i is tokens cu_seqlens[i] to
cu_seqlens[i + 1]). Results are remembered while that tensor lives unchanged, since every layer of a
step asks for the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Result = TypeVar("Result")

_known: Any = WeakIdKeyDictionary()
"""{cu_seqlens: (its version, {question: answer})}."""


@dataclass(frozen=True)
class EqualLengths:
    """Sequences grouped by length, so that each group is one batch with no padding."""

    groups: tuple[tuple[int, int], ...]
    """(length, count) of each group, in the order of `order`; no empty sequences."""
    starts: tuple[Tensor, ...]
    """[count] int64 of each group: the first token of each sequence in the pack."""
    order: Tensor | None
    """[T] int64: tokens sorted by group; None if they already are."""
    restore: Tensor | None
    """[T] int64: the inverse of `order`."""


def check_bounds(cu_seqlens: Tensor, num_tokens: int) -> None:
    """ValueError unless cu_seqlens begins at 0, never falls and ends at `num_tokens`.

    For a tensor on a GPU the first check waits for the device. Skipped while a CUDA graph is
    captured.
    """
    if not _capturing(cu_seqlens):
        _remember(cu_seqlens, ("bounds", num_tokens), lambda: read_bounds(cu_seqlens, num_tokens))


def read_bounds(cu_seqlens: Tensor, num_tokens: int) -> None:
    """The check of `check_bounds`, not remembered: each call on a GPU waits for the device."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens:
        raise ValueError(f"cu_seqlens must begin at 0 and end at {num_tokens} tokens, got {bounds[0]} to {bounds[-1]}")
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end < start:
            raise ValueError(f"cu_seqlens must never fall, but sequence {index} goes from {start} to {end}")


def vouch_for_bounds(cu_seqlens: Tensor, num_tokens: int, longest: int) -> None:
    """Take the bounds as checked, for a caller that checked them before they went to a GPU; the
    longest sequence has `longest` tokens.
    """
    _remember(cu_seqlens, ("bounds", num_tokens), lambda: None)
    _remember(cu_seqlens, "longest", lambda: longest)


def longest_sequence(cu_seqlens: Tensor) -> int:
    """Tokens of the longest sequence. For a tensor on a GPU that nobody has vouched for, the first
    call waits for the device.
    """
    return _remember(cu_seqlens, "longest", lambda: int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0)


def work_items(cu_seqlens: Tensor, num_tokens: int, rows: int) -> Tensor:
    """(first token, length, first row, 0) of each tile of `rows` rows, longest sequence first.

    [items, 4] int32 on the device of `cu_seqlens`. The number of items is an upper bound found
    without reading the values; items beyond the last tile have length 0.
    """
    return _remember(cu_seqlens, ("items", num_tokens, rows), lambda: _work_items(cu_seqlens, num_tokens, rows))


def equal_lengths(cu_seqlens: Tensor) -> EqualLengths:
    """The sequences grouped by length."""
    return _remember(cu_seqlens, "equal lengths", lambda: _equal_lengths(cu_seqlens))


def _remember(cu_seqlens: Tensor, what: Any, build: Callable[[], Result]) -> Result:
    # Inference tensors have no version to show a change; a captured graph must compute anew.
    if cu_seqlens.is_inference() or _capturing(cu_seqlens):
        return build()
    version, answers = _known.get(cu_seqlens, (None, {}))
    if version != cu_seqlens._version:
        answers = {}
        _known[cu_seqlens] = (cu_seqlens._version, answers)
    if what not in answers:
        answers[what] = build()
    result: Result = answers[what]
    return result


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _work_items(cu_seqlens: Tensor, num_tokens: int, rows: int) -> Tensor:
    num_sequences = len(cu_seqlens) - 1
    most = num_tokens // rows + num_sequences
    if most == 0 or num_sequences == 0:
        return cu_seqlens.new_zeros((0, 4))
    # Clamped, since bounds are unchecked while a graph is captured: a wrong answer, no wild access.
    bounds = cu_seqlens.long().clamp(0, num_tokens)
    lengths, order = bounds.diff().clamp(min=0).sort(descending=True, stable=True)
    tiles = (lengths + rows - 1) // rows
    ends = tiles.cumsum(0)
    item = torch.arange(most, device=cu_seqlens.device)
    rank = torch.searchsorted(ends, item, right=True).clamp(max=num_sequences - 1)
    first_row = (item - (ends - tiles)[rank]) * rows
    real = item < ends[-1]
    columns = (bounds[:-1][order][rank], lengths[rank] * real, first_row * real, torch.zeros_like(item))
    return torch.stack(columns, dim=1).int()


def _equal_lengths(cu_seqlens: Tensor) -> EqualLengths:
    bounds = cu_seqlens.long()
    starts, lengths = bounds[:-1], bounds.diff()
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    by_length = lengths.argsort(stable=True)
    runs = _runs(lengths)
    order = restore = None
    if len(runs) > len(torch.unique(lengths)):
        starts, lengths = starts[by_length], lengths[by_length]
        runs = _runs(lengths)
        moved = lengths.cumsum(0) - lengths
        order = (starts - moved).repeat_interleave(lengths) + torch.arange(int(lengths.sum()), device=starts.device)
        restore = torch.empty_like(order)
        restore[order] = torch.arange(len(order), device=order.device)
    return EqualLengths(runs, starts.split([count for _, count in runs]) if runs else (), order, restore)


def _runs(lengths: Tensor) -> tuple[tuple[int, int], ...]:
    return tuple((length, len(list(run))) for length, run in itertools.groupby(lengths.tolist()))
