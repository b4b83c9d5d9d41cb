"""Attention over sequences of any lengths: ours packed, torch's own on padded batches."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

from fedbert_ds.bench.kernels.problem import BOTH, FORWARD, OURS, Build, Prepared, Problem, needs_compiler, plain
from fedbert_kernels.attention import attention, attention_reference

PADDED_BATCH = 64
"""Sequences padded together when lengths differ; all of them when lengths are equal."""


def draw_lengths(lengths: Sequence[int], num_tokens: int, seed: int = 0) -> list[int]:
    """A random sample of real lengths, at most `num_tokens` tokens in all and nearly as many."""
    drawn, left = [], num_tokens
    for length in random.Random(seed).choices(lengths, k=num_tokens):
        if length > left:
            break
        drawn.append(length)
        left -= length
    return drawn


def attention_problem(
    case: str,
    lengths: Sequence[int],
    heads: int,
    head_size: int,
    dtype: torch.dtype,
    dropout: float,
    device: torch.device,
    compiled: bool = True,
) -> Problem:
    """The problem of one mix of lengths; its inputs are qkv, dout and layout."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, heads, head_size, generator=generator).to(device, dtype)
    dout = torch.randn(sum(lengths), heads, head_size, generator=generator).to(device, dtype)
    layout = Packed(lengths, device)
    operations = 4.0 * heads * head_size * sum(length**2 for length in lengths)

    def exact() -> tuple[Tensor, ...]:
        leaf = qkv.double().requires_grad_()
        q, k, v = leaf.unbind(1)
        out = attention_reference(q, k, v, layout.cu_seqlens)
        (gradient,) = torch.autograd.grad(out, leaf, dout.double())
        return out.detach(), gradient

    return Problem(
        kernel="attention",
        case=case,
        dtype=dtype,
        dropout=dropout,
        ways=_ways(qkv, dout, layout, device, compiled),
        exact=exact,
        work={FORWARD: operations, BOTH: 3.5 * operations},
        unit="TFLOP/s",
        facts={"tokens": sum(lengths), "sequences": len(lengths), "heads": heads, "head_size": head_size},
        inputs={"qkv": qkv, "dout": dout, "layout": layout},
    )


class Packed:
    """Where sequences lie, packed and padded."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.longest = max(lengths)
        self.equal = len(set(lengths)) == 1
        self.cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """(tokens before it, [count, longest] bool: places with tokens) of each padded batch."""
        size = len(self.lengths) if self.equal else PADDED_BATCH
        first = 0
        for number in range(0, len(self.lengths), size):
            lengths = torch.tensor(self.lengths[number : number + size], device=self.cu_seqlens.device)
            longest = int(lengths.max())
            if lengths.is_cuda:
                # Whoever pads for tensor cores pads to what they like.
                longest = -(-longest // 8) * 8
            yield first, torch.arange(longest, device=lengths.device) < lengths[:, None]
            first += int(lengths.sum())


def _ways(qkv: Tensor, dout: Tensor, layout: Packed, device: torch.device, compiled: bool) -> dict[str, Build]:
    seed = torch.tensor([1, 2], device=device)

    def ours(dropout: float) -> Prepared:
        return plain(lambda leaf: attention(leaf, layout.cu_seqlens, dropout=dropout, seed=seed), (qkv,), dout)

    def in_batches(dropout: float) -> Prepared:
        return padded(qkv, dout, layout, functools.partial(sdpa, dropout=dropout))

    def compiled_plain(dropout: float) -> Prepared:
        needs_compiler(compiled)
        return padded(qkv, dout, layout, torch.compile(functools.partial(_plain_attention, dropout=dropout)))

    return {OURS: ours, "SDPA, padded": in_batches, "torch.compile, padded": compiled_plain}


def padded(qkv: Tensor, dout: Tensor, layout: Packed, function: Callable[..., Tensor]) -> Prepared:
    """`function(q, k, v, mask)` on batches [count, heads, longest, d]; no padding, no mask."""
    inputs: list[Tensor] = []
    masks: list[Tensor | None] = []
    gradients: list[Tensor] = []
    places = list(layout.batches())

    def pad(packed: Tensor, first: int, real: Tensor) -> Tensor:
        batch = packed.new_zeros(*real.shape, *packed.shape[1:])
        batch[real] = packed[first : first + int(real.sum())]
        # As models have it: heads are a view.
        return batch.transpose(1, 2)

    for first, real in places:
        inputs += [pad(part, first, real).detach().requires_grad_() for part in qkv.unbind(1)]
        gradients.append(pad(dout, first, real))
        masks.append(None if bool(real.all()) else real[:, None, None, :])

    def unpad(batches: Sequence[Tensor]) -> Tensor:
        return torch.cat([batch.transpose(1, 2)[real] for batch, (_, real) in zip(batches, places, strict=True)])

    return Prepared(
        lambda: tuple(function(*inputs[3 * i : 3 * i + 3], mask) for i, mask in enumerate(masks)),
        tuple(inputs),
        tuple(gradients),
        unpad,
        lambda found: (torch.stack([unpad(found[part::3]) for part in range(3)], 1),),
    )


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """torch's scaled_dot_product_attention of [count, heads, longest, d] each."""
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return drop(scores.softmax(-1), dropout) @ v
