"""Bidirectional attention over packed sequences of any lengths, with dropout and a sliding window.

Nothing is padded, and the work does not depend on the longest sequence: a kernel's grid runs over
the tiles that exist (`sequences.py`). Backward is two kernels, one for dQ, one for dK and dV. Each
sums in a fixed order, so the same input always gives the same bits. Both draw the dropout mask
again (`philox.py`); no mask is stored.

On a CPU, and on a GPU without Triton, the same operators run torch's attention over sequences of
equal length.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedbert_kernels import attention_torch
from fedbert_kernels.attention_kernels import (
    attention_backward_kv_kernel,
    attention_backward_q_kernel,
    attention_forward_kernel,
)
from fedbert_kernels.attention_launches import launches, launches_for, padded_head_size
from fedbert_kernels.attention_torch import attention_reference, dropout_mask
from fedbert_kernels.compile_case import ARCHITECTURES, CompileCase
from fedbert_kernels.differentiable import differentiable
from fedbert_kernels.interpreter import HAVE_TRITON, on_its_device
from fedbert_kernels.launch import Launch
from fedbert_kernels.philox import drop_threshold, keep_rate
from fedbert_kernels.sequences import check_bounds, work_items

__all__ = ["attention", "attention_reference", "dropout_mask", "launch_backward", "launch_forward"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_SIZES = range(16, 129)
LOG2_E = 1.4426950408889634

# ---- launch functions ----


@on_its_device
def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    dropout: float,
    sliding_window: int,
    scale: float,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """out [T, heads, d] and lse [heads, T] fp32 (log2 units); launches the forward kernel.

    q, k, v are [T, heads, d] whose last stride is 1.
    """
    num_tokens, heads, d = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((heads, num_tokens), dtype=torch.float32)
    launch = launch or launches_for(q, cu_seqlens, dropout, sliding_window)[0]
    items = work_items(cu_seqlens, num_tokens, launch.rows)
    if len(items):
        attention_forward_kernel[(len(items) * heads,)](
            q,
            k,
            v,
            out,
            lse,
            items,
            cu_seqlens if seed is None else seed,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            out.stride(0),
            q.stride(1),
            k.stride(1),
            v.stride(1),
            heads,
            num_tokens,
            sliding_window,
            scale * LOG2_E,
            keep_rate(dropout),
            drop_threshold(dropout),
            **_constants(launch, d, q.dtype, dropout > 0.0, sliding_window >= 0),
            **launch.options,
        )
    return out, lse


@on_its_device
def launch_backward(
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
    launch_pair: tuple[Launch, Launch] | None = None,
) -> None:
    """Write the gradients into dq, dk, dv [T, heads, d], whose heads are d apart."""
    num_tokens, heads, d = q.shape
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    delta = torch.empty_like(lse)
    launch_q, launch_kv = launch_pair or launches_for(q, cu_seqlens, dropout, sliding_window)[1:]
    seed = cu_seqlens if seed is None else seed
    sizes = (heads, num_tokens, sliding_window)
    inputs = (dout, q, k, v)
    token_strides = tuple(tensor.stride(0) for tensor in inputs)
    head_strides = tuple(tensor.stride(1) for tensor in inputs)
    keep = keep_rate(dropout)
    numbers = (scale * LOG2_E, scale / keep, keep, drop_threshold(dropout))
    items = work_items(cu_seqlens, num_tokens, launch_q.rows)
    if len(items) == 0:
        return
    attention_backward_q_kernel[(len(items) * heads,)](
        *inputs,
        out,
        lse,
        delta,
        dq,
        items,
        seed,
        *token_strides,
        out.stride(0),
        dq.stride(0),
        *head_strides,
        *sizes,
        *numbers,
        **_constants(launch_q, d, q.dtype, dropout > 0.0, sliding_window >= 0),
        **launch_q.options,
    )
    items = work_items(cu_seqlens, num_tokens, launch_kv.columns)
    attention_backward_kv_kernel[(len(items) * heads,)](
        *inputs,
        lse,
        delta,
        dk,
        dv,
        items,
        seed,
        *token_strides,
        dk.stride(0),
        dv.stride(0),
        *head_strides,
        *sizes,
        *numbers,
        **_constants(launch_kv, d, q.dtype, dropout > 0.0, sliding_window >= 0),
        **launch_kv.options,
    )


def _constants(
    launch: Launch, d: int, dtype: torch.dtype, dropout: bool, sliding_window: bool
) -> dict[str, int | bool | str]:
    return {
        "D": d,
        "PADDED_D": padded_head_size(d),
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "DROPOUT": dropout,
        "SLIDING_WINDOW": sliding_window,
        "HIDE_ZERO": launch.hide_zero,
        # Peeling doubles the code, which fp32 does not repay.
        "PEEL": not sliding_window and dtype != torch.float32,
        # Three tf32 products make one of nearly fp32 on tensor cores; 16-bit operands ignore this.
        "PRECISION": "tf32x3",
    }


# ---- operators: one name for every device ----

_INPUTS = "Tensor cu_seqlens, Tensor? seed, float dropout, int sliding_window, float scale"


def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    check_bounds(cu_seqlens, len(q))
    body = launch_forward if HAVE_TRITON and q.is_cuda else attention_torch.forward
    return body(q, k, v, cu_seqlens, *options)


def _backward(dout: Tensor, *arguments: Any) -> None:
    body = launch_backward if HAVE_TRITON and dout.is_cuda else attention_torch.backward
    body(dout, *arguments)


def _attention_forward(q, k, v, cu_seqlens, *options):
    return _forward(_rows(q), _rows(k), _rows(v), cu_seqlens, *options)


def _attention_backward(dout, q, k, v, out, lse, cu_seqlens, *options):
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    _backward(_rows(dout), _rows(q), _rows(k), _rows(v), out, lse, dq, dk, dv, cu_seqlens, *options)
    return dq, dk, dv


def _packed_forward(qkv, cu_seqlens, *options):
    return _forward(*_rows(qkv).unbind(1), cu_seqlens, *options)


def _packed_backward(dout, qkv, out, lse, cu_seqlens, *options):
    dqkv = qkv.new_empty(qkv.shape)
    _backward(_rows(dout), *_rows(qkv).unbind(1), out, lse, *dqkv.unbind(1), cu_seqlens, *options)
    return dqkv


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy if the elements of a row are not neighbours."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _operators(name: str, tensors: str, forward: Any, backward: Any, gradients: str) -> tuple[Any, Any]:
    operator = torch.library.custom_op(
        f"fedbert_kernels::{name}", forward, mutates_args=(), schema=f"({tensors}, {_INPUTS}) -> (Tensor, Tensor)"
    )
    kept = f"Tensor dout, {tensors}, Tensor out, Tensor lse, {_INPUTS}"
    backward_operator = torch.library.custom_op(
        f"fedbert_kernels::{name}_backward", backward, mutates_args=(), schema=f"({kept}) -> {gradients}"
    )
    return operator, backward_operator


_OPERATORS = _operators(
    "attention", "Tensor q, Tensor k, Tensor v", _attention_forward, _attention_backward, "(Tensor, Tensor, Tensor)"
)
_PACKED_OPERATORS = _operators("attention_packed", "Tensor qkv", _packed_forward, _packed_backward, "Tensor")


@_OPERATORS[0].register_fake
def _(q, k, v, cu_seqlens, *options):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@_OPERATORS[1].register_fake
def _(dout, q, k, v, out, lse, cu_seqlens, *options):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


@_PACKED_OPERATORS[0].register_fake
def _(qkv, cu_seqlens, *options):
    num_tokens, _, heads, d = qkv.shape
    return qkv.new_empty((num_tokens, heads, d)), qkv.new_empty((heads, num_tokens), dtype=torch.float32)


@_PACKED_OPERATORS[1].register_fake
def _(dout, qkv, out, lse, cu_seqlens, *options):
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, cu_seqlens, seed, dropout, sliding_window, scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse, cu_seqlens, seed)
    ctx.options = (dropout, sliding_window, scale)


def _differentiate(backward: Callable[..., Any], ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    gradients = backward(dout, *tensors, seed, *ctx.options)
    # Of one tensor, or of three.
    gradients = (gradients,) if isinstance(gradients, Tensor) else gradients
    return *gradients, None, None, None, None, None


_attention = differentiable(_attention_forward, _attention_backward, _OPERATORS, _setup_context, _differentiate)
_attention_packed = differentiable(_packed_forward, _packed_backward, _PACKED_OPERATORS, _setup_context, _differentiate)


def attention(
    inputs: Tensor | tuple[Tensor, Tensor, Tensor],
    cu_seqlens: Tensor,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    sliding_window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Bidirectional attention within each packed sequence: [T, heads, d], differentiable.

    `inputs` is qkv [T, 3, heads, d], whose gradient comes packed as well, or (q, k, v), each [T,
    heads, d]. `cu_seqlens` is [n + 1] int32: sequence i is tokens cu_seqlens[i] to cu_seqlens[i +
    1]. `dropout` of the probabilities is rounded to a multiple of 1/256; kept ones are scaled by
    the rounded rate. The mask follows from `seed`, [2] int64 (seed, offset), and None draws a seed
    from torch's generator. Only the low 32 bits of the offset count: give every layer and step its
    own. `sliding_window` is the number of positions that a token sees on either side; None means
    all. `scale` of the scores is 1 / sqrt(d) unless given.

    ValueError for shapes, dtypes, devices or sequence bounds that do not fit together.
    """
    tensors = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    d = _check(tensors, cu_seqlens, seed, sliding_window, scale)
    if drop_threshold(dropout) and seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (2,), device=cu_seqlens.device)
    operator: Callable[..., tuple[Tensor, Tensor]] = _attention_packed if len(tensors) == 1 else _attention
    out, _ = operator(
        *tensors,
        cu_seqlens,
        seed if dropout > 0.0 else None,
        float(dropout),
        -1 if sliding_window is None else sliding_window,
        d**-0.5 if scale is None else float(scale),
    )
    return out


def _check(
    tensors: tuple[Tensor, ...],
    cu_seqlens: Tensor,
    seed: Tensor | None,
    sliding_window: int | None,
    scale: float | None,
) -> int:
    """The head size; ValueError unless the arguments of `attention` fit (sequence bounds aside)."""
    if len(tensors) not in (1, 3):
        raise ValueError(f"inputs must be qkv or (q, k, v), got {len(tensors)} tensors")
    first = tensors[0]
    if len(tensors) == 1:
        if first.dim() != 4 or first.shape[1] != 3:
            raise ValueError(f"qkv must be [T, 3, heads, d], got {list(first.shape)}")
    elif first.dim() != 3 or any(tensor.shape != first.shape for tensor in tensors):
        raise ValueError(f"q, k, v must be [T, heads, d] alike, got {[list(tensor.shape) for tensor in tensors]}")
    if first.dtype not in DTYPES or any(tensor.dtype != first.dtype for tensor in tensors):
        raise ValueError(f"q, k, v must share fp32, fp16 or bf16, got {[tensor.dtype for tensor in tensors]}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be [n + 1] int32, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if seed is not None and (seed.shape != (2,) or seed.dtype != torch.int64):
        raise ValueError(f"seed must be [2] int64, got {list(seed.shape)} {seed.dtype}")
    devices = {tensor.device for tensor in (*tensors, cu_seqlens, *([] if seed is None else [seed]))}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(map(str, devices))}")
    heads, d = first.shape[-2:]
    if d not in HEAD_SIZES or heads < 1:
        raise ValueError(f"head size must be from 16 to 128 and heads at least 1, got {d} and {heads}")
    if sliding_window is not None and sliding_window < 0:
        raise ValueError(f"sliding_window must be at least 0, got {sliding_window}")
    if scale is not None and not scale > 0.0:
        raise ValueError(f"scale must be positive, got {scale}")
    return d


# ---- compiling without a GPU ----


def compile_cases() -> list[CompileCase]:
    """Every kernel in every dtype and head size; dropout and a sliding window at bf16 alone."""
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    # (head size, dtype, dropout, sliding_window). fp16 and bf16 differ in one opcode; 96 pads to
    # 128.
    variants = [(d, dtype, False, False) for dtype in names for d in (16, 32, 64, 96, 128)]
    # A kernel with dropout takes three times as long to compile, so at 128 it replaces the plain
    # one.
    variants.remove((128, torch.bfloat16, False, False))
    variants += [(d, torch.bfloat16, True, False) for d in (64, 128)]
    variants += [(64, torch.bfloat16, True, True)]
    kernels = {
        "attention_forward": attention_forward_kernel,
        "attention_backward_q": attention_backward_q_kernel,
        "attention_backward_kv": attention_backward_kv_kernel,
    }
    return [
        _compile_case(
            f"{name} {names[dtype]} d{d}{' dropout' if dropout else ''}{' sliding_window' if sliding_window else ''}",
            kernel,
            launch,
            _constants(launch, d, dtype, dropout, sliding_window),
            names[dtype],
            architecture,
        )
        for d, dtype, dropout, sliding_window in variants
        for architecture in ARCHITECTURES
        for (name, kernel), launch in zip(
            kernels.items(), launches(d, dtype, sliding_window, architecture), strict=True
        )
    ]


def _compile_case(
    name: str, kernel: Any, launch: Launch, constants: dict[str, Any], dtype: str, architecture: int
) -> CompileCase:
    arguments = [argument for argument in kernel.arg_names if argument not in constants]
    return CompileCase(
        name=name,
        kernel=kernel,
        signature={argument: _argument_type(argument, dtype) for argument in arguments},
        constants=constants,
        options=launch.options,
        divisible_by_16=tuple(argument for argument in arguments if argument.endswith("stride")),
        architectures=(architecture,),
        # Padded sizes may spill a few registers.
        spill_free=constants["D"] == constants["PADDED_D"],
        tensor_cores=True,
    )


def _argument_type(argument: str, dtype: str) -> str:
    special = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "items_ptr": "*i32", "seed_ptr": "*i64"}
    special |= dict.fromkeys(("scale_log2", "gradient_scale", "keep"), "fp32")
    return special.get(argument, f"*{dtype}" if argument.endswith("_ptr") else "i32")
