"""Attention over packed sequences, registered with transformers: its layers then run on [1, T, H].

Sequences follow one another without padding. A `Packing` says where each begins; it passes through
the encoder as the keyword argument `packing`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fedbert_kernels.recompute import again

Attend = Callable[..., Tensor]
"""As `fedbert_kernels.attention.attention`, without its seed."""

PACKED_ATTENTION = "fedbert_packed"
"""Value of a transformers config's `_attn_implementation` that selects `packed_attention`."""


@dataclass(frozen=True)
class Packing:
    """How T packed tokens divide into n sequences; made once a micro-batch, used by every layer."""

    cu_seqlens: Tensor
    """[n + 1] int32: sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1]."""
    positions: Tensor
    """[T] int64: index of each token in its sequence."""
    max_length: int
    """Length of the longest sequence."""
    attend: Attend | None = None
    """Attention that takes packed sequences as they are; None is torch's, by groups."""
    groups: tuple[tuple[int, int], ...] = ()
    """(length, count) of sequences that are attended as one batch, in the order of `order`."""
    order: Tensor | None = None
    """[T] int64: tokens sorted so that equal lengths are neighbours; None if they already are."""
    restore: Tensor | None = None
    """[T] int64: the inverse of `order`."""
    is_recomputed: bool = False
    """Whether backward computes attention again: nothing but query, key and value is kept."""

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device | str = "cpu", *, attend: Attend | None = None
    ) -> Packing:
        """Pack sequences of the given lengths; ValueError if there are none or one is empty."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"sequence lengths must be positive and at least one, got {list(lengths)}")
        num_tokens, longest = sum(lengths), max(lengths)
        # A copy from memory that is not pinned would wait for the device's work. Tensors of T
        # entries are made there.
        on_host = torch.tensor(lengths, dtype=torch.int64, pin_memory=torch.device(device).type not in ("cpu", "meta"))
        counts = on_host.to(device, non_blocking=True)
        ends = counts.cumsum(0)
        starts = ends - counts
        tokens = torch.arange(num_tokens, device=device)
        positions = tokens - starts.repeat_interleave(counts, output_size=num_tokens)
        cu_seqlens = torch.cat([starts[:1], ends]).int()
        if attend is not None:
            from fedbert_kernels.sequences import vouch_for_bounds

            vouch_for_bounds(cu_seqlens, num_tokens, longest)
            return cls(cu_seqlens, positions, longest, attend)
        groups = _runs(lengths)
        if len(groups) == len(set(lengths)):
            return cls(cu_seqlens, positions, longest, groups=groups)
        counts, by_length = counts.sort(stable=True)
        moved = starts[by_length] - (counts.cumsum(0) - counts)
        order = tokens + moved.repeat_interleave(counts, output_size=num_tokens)
        restore = torch.empty_like(order)
        restore[order] = tokens
        return cls(cu_seqlens, positions, longest, None, _runs(sorted(lengths)), order, restore)

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Tensor, num_tokens: int, device: torch.device | str = "cpu", *, attend: Attend | None = None
    ) -> Packing:
        """Pack by cumulative lengths, [n + 1] of any integer type.

        Best on the CPU: a GPU tensor costs a wait. ValueError unless they begin at 0, strictly
        increase, and end at `num_tokens`.
        """
        bounds = cu_seqlens.tolist()
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != num_tokens:
            raise ValueError(f"cu_seqlens must begin at 0 and end at {num_tokens} tokens, got {bounds}")
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        if min(lengths) < 1:
            raise ValueError(f"cu_seqlens must strictly increase, got {bounds}")
        return cls.from_lengths(lengths, device, attend=attend)


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
    sliding_window: int | None = None,
    qkv: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Bidirectional attention within each sequence, as transformers' attention interface.

    `query`, `key`, `value` are [1, heads, T, d]; `attention_mask` is unused, since nothing is
    padded. `sliding_window` is ModernBERT's: positions that a token sees on either side, itself
    counted. `qkv` [1, T, 3, heads, d], where given, is the tensor that the three are views of.
    Returns [1, T, heads, d] and no attention weights.
    """
    # transformers counts the token itself; the operators do not.
    each_side = None if sliding_window is None else sliding_window - 1
    attend: Callable[..., Tensor]
    if qkv is None and value.stride(2) != value.shape[1] * value.shape[3]:
        # Where queries and keys were rotated, values are a view of all three, whose memory backward
        # would keep for a third of it.
        value = value.transpose(1, 2).contiguous().transpose(1, 2)
    tensors: tuple[Tensor, ...] = (query, key, value)
    if packing.attend is None:
        attend = partial(grouped_attention, packing=packing, dropout=dropout, scaling=scaling, sliding_window=each_side)
    else:
        tensors = tensors if qkv is None else (qkv,)
        attend = partial(_fused_attention, packing, dropout, scaling, each_side)
    return again(attend, *tensors, draws=dropout > 0.0) if packing.is_recomputed else attend(*tensors), None


def _fused_attention(
    packing: Packing, dropout: float, scaling: float | None, sliding_window: int | None, *tensors: Tensor
) -> Tensor:
    """`packing.attend` of qkv, or of query, key and value."""
    assert packing.attend is not None
    is_joined = len(tensors) == 1
    attended = packing.attend(
        tensors[0].squeeze(0) if is_joined else [tensor.squeeze(0).transpose(0, 1) for tensor in tensors],
        packing.cu_seqlens,
        dropout=dropout,
        sliding_window=sliding_window,
        scale=scaling,
    )
    return attended.unsqueeze(0)


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    packing: Packing,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None = None,
) -> Tensor:
    """Torch's SDPA over batches of sequences of equal length; [1, heads, T, d] each, and the result
    [1, T, heads, d].

    Tokens move only if equal lengths are not neighbours (`packing.order`). A token sees
    `sliding_window` positions on either side, or all.
    """
    heads, size = query.shape[1], query.shape[3]
    tensors = [query, key, value]
    if packing.order is not None:
        tensors = [one.transpose(1, 2).index_select(1, packing.order).transpose(1, 2) for one in tensors]
    # split, not slices: its backward writes each gradient once, without sums of padded copies.
    sizes = [length * count for length, count in packing.groups]
    parts_of = [one.split(sizes, dim=2) if len(sizes) > 1 else (one,) for one in tensors]
    pieces = []
    for (length, count), *parts in zip(packing.groups, *parts_of, strict=True):
        # Views, as few as can be: each costs the host twice.
        batch = [part.view(heads, count, length, size).transpose(0, 1) for part in parts]
        mask = _sliding_window_mask(length, sliding_window, query.device)
        attended = scaled_dot_product_attention(
            batch[0], batch[1], batch[2], attn_mask=mask, dropout_p=dropout, scale=scaling
        )
        pieces.append(attended.transpose(1, 2).reshape(1, length * count, heads, size))
    result = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    return result if packing.restore is None else result.index_select(1, packing.restore)


def _sliding_window_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """[length, length] bool, true where a position sees another; None if each sees all."""
    if sliding_window is None or sliding_window >= length - 1:
        return None
    position = torch.arange(length, device=device)
    return (position[:, None] - position).abs() <= sliding_window


def _runs(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((length, len(list(run))) for length, run in itertools.groupby(lengths))


ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, packed_attention)
