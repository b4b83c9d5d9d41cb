"""Attention over sequences of any lengths: ours, and every other way that torch and flash-attn have to compute it.

Each gets its inputs as it likes them best, laid out beforehand: packed, or padded in batches.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

from fedbert_ds.bench.kernels.problem import (
    BOTH,
    FORWARD,
    OURS,
    Build,
    Prepared,
    Problem,
    Unavailable,
    installed,
    needs_compiler,
    needs_gpu,
    plain,
)
from fedbert_kernels.attention import attention, attention_reference

PADDED_BATCH = 64
"""Sequences that are padded together, to the longest of them, when lengths differ; all of them when they are equal."""


def draw_lengths(lengths: Sequence[int], num_tokens: int, seed: int = 0) -> list[int]:
    """A random sample of real lengths with at most `num_tokens` tokens in all, and nearly as many."""
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
    """The problem of one mix of lengths, with all baselines; those that torch.compile makes only if `compiled`."""
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
    )


class Packed:
    """Where sequences lie, packed and padded."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.longest = max(lengths)
        self.equal = len(set(lengths)) == 1
        self.cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """(tokens before it, [count, longest] bool: which places hold tokens) of each padded batch."""
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
    from torch.nn.attention import SDPBackend, sdpa_kernel

    seed = torch.tensor([1, 2], device=device)

    def ours(dropout: float) -> Prepared:
        return plain(lambda leaf: attention(leaf, layout.cu_seqlens, dropout=dropout, seed=seed), (qkv,), dout)

    def padded(dropout: float) -> Prepared:
        return _padded(qkv, dout, layout, functools.partial(_sdpa, dropout=dropout))

    def flash(dropout: float) -> Prepared:
        needs_gpu(device)
        return _separate(qkv, dout, lambda q, k, v: TorchFlash.apply(q, k, v, layout, dropout))

    def varlen(dropout: float) -> Prepared:
        _needs_no_dropout(dropout)
        needs_gpu(device)
        function = installed("torch.nn.attention.varlen", "varlen_attn")
        bounds = (layout.cu_seqlens, layout.cu_seqlens, layout.longest, layout.longest)
        return _separate(qkv, dout, lambda q, k, v: function(q, k, v, *bounds))

    def cudnn(dropout: float) -> Prepared:
        needs_gpu(device)
        backend = functools.partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)
        return _padded(qkv, dout, layout, functools.partial(_sdpa, dropout=dropout, backend=backend))

    def flex(dropout: float) -> Prepared:
        _needs_no_dropout(dropout)
        needs_compiler(compiled)
        return _flex(qkv, dout, layout, device)

    def compiled_plain(dropout: float) -> Prepared:
        needs_compiler(compiled)
        return _padded(qkv, dout, layout, torch.compile(functools.partial(_plain_attention, dropout=dropout)))

    def flash_attn(dropout: float) -> Prepared:
        function = installed("flash_attn", "flash_attn_varlen_qkvpacked_func")
        needs_gpu(device)
        return plain(lambda leaf: function(leaf, layout.cu_seqlens, layout.longest, dropout_p=dropout), (qkv,), dout)

    def flash_attn_3(dropout: float) -> Prepared:
        _needs_no_dropout(dropout)
        function = installed("flash_attn_interface", "flash_attn_varlen_func")
        needs_gpu(device)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result = function(q, k, v, layout.cu_seqlens, layout.cu_seqlens, layout.longest, layout.longest)
            out: Tensor = result[0] if isinstance(result, tuple) else result
            return out

        return _separate(qkv, dout, call)

    return {
        OURS: ours,
        "SDPA, padded": padded,
        "FlashAttention-2 in torch": flash,
        "torch varlen_attn": varlen,
        "cuDNN, padded": cudnn,
        "FlexAttention": flex,
        "torch.compile, padded": compiled_plain,
        "flash-attn": flash_attn,
        "flash-attn 3": flash_attn_3,
    }


# ---- layouts ----


def _separate(qkv: Tensor, dout: Tensor, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Prepared:
    """q, k and v as three leaves, so that no baseline pays for packing gradients it was not asked to pack."""
    inputs = tuple(part.contiguous().requires_grad_() for part in qkv.unbind(1))
    return Prepared(
        lambda: (function(*inputs),),
        inputs,
        (dout,),
        unpack_gradients=lambda gradients: (torch.stack(gradients, 1),),
    )


def _padded(qkv: Tensor, dout: Tensor, layout: Packed, function: Callable[..., Tensor]) -> Prepared:
    """Batches of `function(q, k, v, mask)` of [count, heads, longest, d] each; mask is None if there is no padding."""
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


# ---- what they call ----


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    backend: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    with backend():
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return drop(scores.softmax(-1), dropout) @ v


class TorchFlash(torch.autograd.Function):
    """The FlashAttention-2 inside torch, whose public function takes no dropout."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Packed, dropout: float) -> Tensor:
        ctx.shape = (layout.cu_seqlens, layout.cu_seqlens, layout.longest, layout.longest, dropout, False)
        out, lse, random_state, unused, _ = torch.ops.aten._flash_attention_forward(q, k, v, *ctx.shape, False)
        ctx.save_for_backward(q, k, v, out, lse, random_state, unused)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        *saved, random_state, unused = ctx.saved_tensors
        found = torch.ops.aten._flash_attention_backward(gradients[0], *saved, *ctx.shape, random_state, unused)
        return *found, None, None


def _flex(qkv: Tensor, dout: Tensor, layout: Packed, device: torch.device) -> Prepared:
    """All sequences as one, with a block mask that keeps them apart; the mask is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    num_tokens = sum(layout.lengths)
    lengths = torch.tensor(layout.lengths, device=device)
    sequence = torch.arange(len(lengths), device=device).repeat_interleave(lengths)

    def same_sequence(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return sequence[row] == sequence[column]

    mask = create_block_mask(same_sequence, None, None, num_tokens, num_tokens, str(device), _compile=True)
    function: Callable[..., Any] = torch.compile(flex_attention)
    detached = tuple(part.transpose(0, 1)[None].detach() for part in qkv.unbind(1))
    inputs = tuple(part.detach().requires_grad_() for part in detached)
    return Prepared(
        # On a CPU it refuses leaves even where no gradient is asked for.
        lambda: (function(*(inputs if torch.is_grad_enabled() else detached), block_mask=mask),),
        inputs,
        (dout.transpose(0, 1)[None],),
        lambda outputs: outputs[0][0].transpose(0, 1),
        lambda found: (torch.stack([gradient[0].transpose(0, 1) for gradient in found], 1),),
    )


def _needs_no_dropout(dropout: float) -> None:
    if dropout:
        raise Unavailable("has no dropout")
