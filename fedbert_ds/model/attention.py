"""Attention over packed sequences, registered with transformers so that its own layers run on `[1, T, H]`.

Sequences lie one after another with no padding; a `Packing` says where each begins and is passed through the encoder
as the keyword argument `packing`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED_ATTENTION = "fedbert_packed"
"""Value of a transformers config's `_attn_implementation` that selects `packed_attention`."""


@dataclass(frozen=True)
class Packing:
    """Where T packed tokens divide into n sequences; computed once per micro-batch, used by every layer."""

    cu_seqlens: Tensor
    """[n + 1] int32: sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1]."""
    positions: Tensor
    """[T] int64: index of each token in its sequence."""
    max_length: int
    """Length of the longest sequence."""
    groups: tuple[tuple[int, int], ...]
    """(length, count) of sequences that are attended as one batch, in the order of `order`."""
    order: Tensor | None
    """[T] int64: tokens sorted so that sequences of equal length are neighbours; None if they already are."""
    restore: Tensor | None
    """[T] int64: the inverse of `order`."""

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Packing:
        """Pack sequences of the given lengths; ValueError if there are none or one is empty."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"sequence lengths must be positive and at least one, got {list(lengths)}")
        counts = torch.tensor(lengths, dtype=torch.int64)
        ends = counts.cumsum(0)
        starts = ends - counts
        positions = torch.arange(int(ends[-1])) - starts.repeat_interleave(counts)
        groups = _runs(lengths)
        order = restore = None
        if len(groups) > len(set(lengths)):
            by_length = counts.argsort(stable=True)
            order = torch.arange(len(positions)) + (
                starts[by_length] - _exclusive_sum(counts[by_length])
            ).repeat_interleave(counts[by_length])
            restore = torch.empty_like(order)
            restore[order] = torch.arange(len(order))
            groups = _runs(counts[by_length].tolist())
            order, restore = order.to(device), restore.to(device)
        return cls(
            cu_seqlens=torch.cat([starts[:1], ends]).to(device, torch.int32),
            positions=positions.to(device),
            max_length=max(lengths),
            groups=groups,
            order=order,
            restore=restore,
        )

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, num_tokens: int, device: torch.device | str = "cpu") -> Packing:
        """Pack by cumulative lengths, [n + 1] of any integer type, best on the CPU (a GPU tensor costs a sync).

        ValueError unless they begin at 0, strictly increase, and end at `num_tokens`.
        """
        bounds = cu_seqlens.tolist()
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != num_tokens:
            raise ValueError(f"cu_seqlens must begin at 0 and end at {num_tokens} tokens, got {bounds}")
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        if min(lengths) < 1:
            raise ValueError(f"cu_seqlens must strictly increase, got {bounds}")
        return cls.from_lengths(lengths, device)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Bidirectional attention within each sequence; the signature is transformers' attention interface.

    `query`, `key`, `value` are [1, heads, T, d]; `attention_mask` is unused, since nothing is padded. Returns
    [1, T, heads, d] and no attention weights.
    """
    # The one seam: a fused variable-length kernel for CUDA takes over here, given packing.cu_seqlens and
    # packing.max_length.
    by_token = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    return grouped_attention(*by_token, packing=packing, dropout=dropout, scaling=scaling).unsqueeze(0), None


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, *, packing: Packing, dropout: float, scaling: float | None
) -> Tensor:
    """Torch's SDPA over sequences of equal length batched together; [T, heads, d] each, and returned.

    Tokens move only if equal lengths are scattered over the micro-batch (`packing.order`).
    """
    tensors = [query, key, value]
    if packing.order is not None:
        tensors = [tensor.index_select(0, packing.order) for tensor in tensors]
    # split, not slices: its backward writes each gradient once instead of summing zero-padded copies per group.
    sizes = [length * count for length, count in packing.groups]
    pieces = []
    for (length, count), *parts in zip(packing.groups, *(tensor.split(sizes) for tensor in tensors), strict=True):
        batch = [part.unflatten(0, (count, length)).transpose(1, 2) for part in parts]
        attended = scaled_dot_product_attention(batch[0], batch[1], batch[2], dropout_p=dropout, scale=scaling)
        pieces.append(attended.transpose(1, 2).flatten(0, 1))
    result = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return result if packing.restore is None else result.index_select(0, packing.restore)


def _runs(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((length, len(list(run))) for length, run in itertools.groupby(lengths))


def _exclusive_sum(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, packed_attention)
