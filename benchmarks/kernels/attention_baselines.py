"""Attention by everything else there is: FlashAttention in torch, flash-attn, cuDNN, FlexAttention.

Each gets its inputs as it likes them best, laid out beforehand: packed, or padded in batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.available import installed, needs_gpu, needs_no_dropout
from fedbert_ds.bench.kernels.attention import Packed, padded, sdpa
from fedbert_ds.bench.kernels.problem import Build, Prepared, Problem, needs_compiler, plain


def attention_baselines(problem: Problem, compiled: bool = True) -> dict[str, Build]:
    """Further ways to compute the problem; those that torch.compile makes only if `compiled`."""
    qkv, dout, layout = (problem.inputs[name] for name in ("qkv", "dout", "layout"))
    device = qkv.device

    def flash(dropout: float) -> Prepared:
        needs_gpu(device)
        return _separate(qkv, dout, lambda q, k, v: TorchFlash.apply(q, k, v, layout, dropout))

    def varlen(dropout: float) -> Prepared:
        needs_no_dropout(dropout)
        needs_gpu(device)
        function = installed("torch.nn.attention.varlen", "varlen_attn")
        bounds = (layout.cu_seqlens, layout.cu_seqlens, layout.longest, layout.longest)
        return _separate(qkv, dout, lambda q, k, v: function(q, k, v, *bounds))

    def cudnn(dropout: float) -> Prepared:
        needs_gpu(device)

        def by_cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return sdpa(q, k, v, mask, dropout)

        return padded(qkv, dout, layout, by_cudnn)

    def flex(dropout: float) -> Prepared:
        needs_no_dropout(dropout)
        needs_compiler(compiled)
        return _flex(qkv, dout, layout, device)

    def flash_attn(dropout: float) -> Prepared:
        function = installed("flash_attn", "flash_attn_varlen_qkvpacked_func")
        needs_gpu(device)
        return plain(lambda leaf: function(leaf, layout.cu_seqlens, layout.longest, dropout_p=dropout), (qkv,), dout)

    def flash_attn_3(dropout: float) -> Prepared:
        needs_no_dropout(dropout)
        function = installed("flash_attn_interface", "flash_attn_varlen_func")
        needs_gpu(device)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result = function(q, k, v, layout.cu_seqlens, layout.cu_seqlens, layout.longest, layout.longest)
            out: Tensor = result[0] if isinstance(result, tuple) else result
            return out

        return _separate(qkv, dout, call)

    return {
        "FlashAttention-2 in torch": flash,
        "torch varlen_attn": varlen,
        "cuDNN, padded": cudnn,
        "FlexAttention": flex,
        "flash-attn": flash_attn,
        "flash-attn 3": flash_attn_3,
    }


def _separate(qkv: Tensor, dout: Tensor, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Prepared:
    """q, k and v as three leaves: no baseline pays for packing gradients."""
    inputs = tuple(part.contiguous().requires_grad_() for part in qkv.unbind(1))
    return Prepared(
        lambda: (function(*inputs),),
        inputs,
        (dout,),
        unpack_gradients=lambda gradients: (torch.stack(gradients, 1),),
    )


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
    """All sequences as one, kept apart by a block mask that is made beforehand."""
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
