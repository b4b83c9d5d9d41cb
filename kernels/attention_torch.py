"""Attention over packed sequences in torch: the reference, and the body without Triton.

The body batches sequences of equal length, so nothing is padded. Without dropout it calls torch's
own attention for CPUs. With dropout it computes scores in chunks and draws the kernels' mask, bit
by bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedbert_kernels.philox import drop_threshold, dropped_bytes, keep_factor, keep_mask_reference, keep_rate
from fedbert_kernels.sequences import EqualLengths, equal_lengths

CHUNK = 1 << 22
"""Scores computed at once: 16 MiB in fp32, of which a step holds a few."""


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    sliding_window: int | None = None,
    scale: float | None = None,
    upcast: bool = False,
) -> Tensor:
    """out [T, heads, d] of q, k, v [T, heads, d], one sequence at a time, for autograd.

    Computes in the dtype of its arguments, or with `upcast` in fp64 throughout.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    masks = dropout_mask(seed, cu_seqlens, q.shape[1], dropout) if seed is not None and dropout > 0.0 else None
    outs = [q[:0]]
    for index, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        # Each [heads, length, d].
        parts = (tensor[start:end].transpose(0, 1) for tensor in (q, k, v))
        query, key, value = (part.double() if upcast else part for part in parts)
        scores = query @ key.mT * scale
        if sliding_window is not None:
            scores = scores.masked_fill(~_inside_sliding_window(end - start, sliding_window, q.device), float("-inf"))
        p = scores.softmax(-1)
        if masks is not None:
            p = p * masks[index] / keep_rate(dropout)
        outs.append((p @ value).transpose(0, 1))
    return torch.cat(outs).to(torch.float64 if upcast else q.dtype)


def dropout_mask(seed: Tensor, cu_seqlens: Tensor, heads: int, dropout: float) -> list[Tensor]:
    """Each sequence's dropout mask, [heads, length, length] bool: True where a probability is kept.

    It depends on `seed` ([2] int64: seed and offset), the head, and the sequence's first token.
    """
    starts = cu_seqlens[:-1].long()
    streams = starts[:, None] * heads + torch.arange(heads, device=starts.device)
    lengths = cu_seqlens.diff().tolist()
    threshold = drop_threshold(dropout)
    return [
        keep_mask_reference(stream, length, seed, threshold) for stream, length in zip(streams, lengths, strict=True)
    ]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    dropout: float,
    sliding_window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [T, heads, d] and lse [heads, T] fp32.

    lse is for `backward` only: in natural units, and sorted by length.
    """
    order = equal_lengths(cu_seqlens)
    out, lse = q.new_empty(q.shape), q.new_empty((q.shape[1], len(q)), dtype=torch.float32)
    for group in _groups(order, (q, k, v), (out,), lse, seed, dropout):
        qs, ks, vs = group.inputs
        if dropout == 0.0 and q.device.type == "cpu":
            result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                qs, ks, vs, attn_mask=_sliding_window_bias(group.length, sliding_window, q.dtype, q.device), scale=scale
            )
        else:
            result = _explicit_forward(group, dropout, sliding_window, scale)
        group.outputs[0].copy_(result[0])
        group.lse.copy_(result[1])
    return _restored(order, out), lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    dropout: float,
    sliding_window: int,
    scale: float,
) -> None:
    """Write the gradients into dq, dk, dv [T, heads, d], of any strides."""
    order = equal_lengths(cu_seqlens)
    # Gradients go straight to their place, unless the tokens were sorted.
    sorted_gradients = (dq, dk, dv) if order.order is None else tuple(torch.empty_like(dq) for _ in range(3))
    for group in _groups(order, (q, k, v, out, dout), sorted_gradients, lse, seed, dropout):
        qs, ks, vs, outs, douts = group.inputs
        if dropout == 0.0 and q.device.type == "cpu":
            bias = _sliding_window_bias(group.length, sliding_window, q.dtype, q.device)
            result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                douts, qs, ks, vs, outs, group.lse, 0.0, False, attn_mask=bias, scale=scale
            )
        else:
            result = _explicit_backward(group, dropout, sliding_window, scale)
        for gradient, values in zip(group.outputs, result, strict=True):
            gradient.copy_(values)
    if order.restore is not None:
        for gradient, values in zip((dq, dk, dv), sorted_gradients, strict=True):
            gradient.copy_(_restored(order, values))


@dataclass(frozen=True)
class _Group:
    """Sequences of one length, as one batch."""

    length: int
    inputs: tuple[Tensor, ...]
    """[count, heads, length, d] each."""
    outputs: tuple[Tensor, ...]
    """Views to write to, of the same shape."""
    lse: Tensor
    """[count, heads, length] fp32, a view."""
    dropped: Tensor
    """[count * heads, ...] uint8: `dropped_bytes` of each score matrix; empty without dropout."""


def _groups(
    order: EqualLengths,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    lse: Tensor,
    seed: Tensor | None,
    dropout: float,
) -> Iterator[_Group]:
    """Views of [T, heads, d] tensors and of lse [heads, T].

    `outputs` and `lse` are in sorted order.
    """
    if order.order is not None:
        inputs = tuple(tensor.index_select(0, order.order) for tensor in inputs)
    first = 0
    bits = _dropped(order, lse.shape[0], seed, dropout)
    for (length, count), dropped in zip(order.groups, bits, strict=True):
        tokens = slice(first, first + length * count)
        first = tokens.stop
        yield _Group(
            length,
            tuple(tensor[tokens].unflatten(0, (count, length)).transpose(1, 2) for tensor in inputs),
            tuple(tensor[tokens].unflatten(0, (count, length)).transpose(1, 2) for tensor in outputs),
            lse[:, tokens].unflatten(1, (count, length)).transpose(0, 1),
            dropped,
        )


def _dropped(order: EqualLengths, heads: int, seed: Tensor | None, dropout: float) -> Iterator[Tensor]:
    """`dropped_bytes` of each group, [count * heads, ...]; empty without dropout."""
    for blocks, run in itertools.groupby(zip(order.groups, order.starts, strict=True), _blocks):
        starts = [starts for _, starts in run]
        if seed is None or dropout == 0.0:
            yield from (first.new_empty(len(first) * heads, 0) for first in starts)
            continue
        # A short sequence's mask is the corner of a longer one's, so groups with the same number of
        # 64-wide blocks share the many small operations of a draw. A draw takes a hundred times the
        # memory of its bits, hence the pieces.
        streams = (torch.cat(starts)[:, None] * heads + torch.arange(heads, device=starts[0].device)).flatten()
        pieces = _chunks(64 * blocks, streams)
        bits = torch.cat([dropped_bytes(piece, 64 * blocks, seed, drop_threshold(dropout)) for (piece,) in pieces])
        yield from bits.split([len(first) * heads for first in starts])


def _blocks(group: tuple[tuple[int, int], Tensor]) -> int:
    (length, _), _ = group
    return -(-length // 64)


def _restored(order: EqualLengths, tensor: Tensor) -> Tensor:
    return tensor if order.restore is None else tensor.index_select(0, order.restore)


def _explicit_forward(group: _Group, dropout: float, sliding_window: int, scale: float) -> tuple[Tensor, Tensor]:
    shape = group.inputs[0].shape
    flat = (tensor.flatten(0, 1) for tensor in group.inputs)
    outs, sums = [], []
    for dropped, q, k, v in _chunks(group.length, group.dropped, *flat):
        scores = _scores(q, k, sliding_window, scale)
        sums.append(scores.logsumexp(-1))
        p = scores.softmax(-1)
        if dropout > 0.0:
            p.mul_(keep_factor(dropped, group.length, drop_threshold(dropout)))
        outs.append(p @ v.float())
    return torch.cat(outs).view(shape), torch.cat(sums).view(shape[:3])


def _explicit_backward(group: _Group, dropout: float, sliding_window: int, scale: float) -> tuple[Tensor, ...]:
    shape = group.inputs[0].shape
    flat = (tensor.flatten(0, 1) for tensor in group.inputs)
    gradients = []
    for dropped, *tensors in _chunks(group.length, group.dropped, *flat):
        q, k, v, _, dout = (tensor.float() for tensor in tensors)
        # From the scores, not from lse: subtracting two large numbers would cost digits.
        p = _scores(q, k, sliding_window, scale).softmax(-1)
        dp = dout @ v.mT
        kept_p = p
        if dropout > 0.0:
            factor = keep_factor(dropped, group.length, drop_threshold(dropout))
            dp.mul_(factor)
            kept_p = factor.mul_(p)
        # From the scores too: `out` is rounded, and the difference may be small.
        delta = torch.linalg.vecdot(p, dp).unsqueeze(-1)
        ds = dp.sub_(delta).mul_(p).mul_(scale)
        gradients.append((ds @ k, ds.mT @ q, kept_p.mT @ dout))
    return tuple(torch.cat(parts).view(shape) for parts in zip(*gradients, strict=True))


def _chunks(length: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut the tensors along axis 0, that of score matrices, into pieces of CHUNK scores."""
    size = max(1, CHUNK // length**2)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _scores(q: Tensor, k: Tensor, sliding_window: int, scale: float) -> Tensor:
    """[matrices, length, length] fp32 scores of q, k [matrices, length, d]."""
    scores = (q.float() @ k.float().mT).mul_(scale)
    if sliding_window >= 0:
        scores.masked_fill_(~_inside_sliding_window(q.shape[1], sliding_window, q.device), float("-inf"))
    return scores


def _inside_sliding_window(length: int, sliding_window: int, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    return (position[:, None] - position).abs() <= sliding_window


def _sliding_window_bias(length: int, sliding_window: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """[length, length] 0 inside the sliding window, -inf outside; None if it covers everything."""
    if sliding_window < 0 or sliding_window >= length - 1:
        return None
    outside = ~_inside_sliding_window(length, sliding_window, device)
    return torch.zeros(outside.shape, dtype=dtype, device=device).masked_fill_(outside, float("-inf"))
