"""Bias + GELU (erf form, as BERT's) in one pass, and its backward.

The matrix product before it is torch's. Backward recomputes from the pre-activation, so only the
input is saved. The bias gradient is summed in two stages in a fixed order: the same input always
gives the same bits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedbert_kernels.compile_case import CompileCase
from fedbert_kernels.differentiable import differentiable
from fedbert_kernels.interpreter import INTERPRETED, jit, jit_for_any, narrow, on_its_device, runs_triton, tl

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# ---- kernels ----


@jit
def _normal(h, FAST: tl.constexpr):
    """Cumulative distribution and density of the standard normal at h, in fp32.

    FAST is Abramowitz and Stegun's formula 7.1.26, off by at most 1e-7. With erf, a 16-bit kernel
    waits for instructions rather than memory; this takes a third fewer in backward. It shares the
    density's exponential, and for negative h it keeps the relative precision that 1 + erf loses.
    """
    exponential = tl.exp2(h * h * -0.7213475204444817)
    if FAST:
        # 0.3275911 / sqrt(2)
        t = 1.0 / (1.0 + 0.23164189 * tl.abs(h))
        polynomial = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
        tail = 0.5 * exponential * t * (0.254829592 + t * (-0.284496736 + t * polynomial))
        cumulative = tl.where(h < 0.0, tail, 1.0 - tail)
    else:
        cumulative = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
    return cumulative, exponential * 0.3989422804014327


@jit_for_any("num_rows")
def _forward_kernel(
    x_ptr,  # [num_rows, width]
    bias_ptr,  # [width]; unused without HAS_BIAS
    y_ptr,  # [num_rows, width]
    num_rows,
    width,
    HAS_BIAS: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # int64: a packed batch times the intermediate size can pass 2**31.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    offsets = rows[:, None] * width + columns[None, :]
    h = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        h += tl.load(bias_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    cumulative, _ = _normal(h, FAST)
    tl.store(y_ptr + offsets, narrow(h * cumulative, y_ptr.dtype.element_ty), mask=inside)


@jit_for_any("num_rows")
def _backward_kernel(
    dy_ptr,  # [num_rows, width]
    x_ptr,  # [num_rows, width]
    bias_ptr,  # [width]; unused without HAS_BIAS
    dx_ptr,  # [num_rows, width]
    partial_ptr,  # [programs, width] fp32: shares of the bias gradient; unused without HAS_BIAS
    num_rows,
    width,
    HAS_BIAS: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_inside = columns < width
    bias = tl.zeros([COLUMNS], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < num_rows)[:, None] & column_inside[None, :]
        offsets = rows[:, None] * width + columns[None, :]
        h = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        cumulative, density = _normal(h, FAST)
        dx = dy * (cumulative + h * density)
        tl.store(dx_ptr + offsets, narrow(dx, dx_ptr.dtype.element_ty), mask=inside)
        dbias += dx
    if HAS_BIAS:
        tl.store(partial_ptr + tl.program_id(0) * width + columns, tl.sum(dbias, axis=0), mask=column_inside)


# ---- launch functions ----

COLUMNS = 1024
"""Columns of a block: 8 a thread with 4 warps, one 128-bit load of 16-bit values."""

ROWS = 32 if INTERPRETED else 2
"""Rows of a block; the interpreter's time grows with the number of blocks."""

PROGRAMS = 2048
"""Programs of backward over all blocks of columns; a constant, so that every card sums alike."""


def _fast(x: Tensor) -> bool:
    # fp32 moves twice the bytes, which hide the cost of erf, and would show an error of 1e-7.
    return x.dtype != torch.float32


@on_its_device
def launch_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """GELU of x [T, N] + bias [N], by the kernel."""
    num_rows, width = x.shape
    y = torch.empty_like(x)
    if x.numel():
        grid = (-(-num_rows // ROWS), -(-width // COLUMNS))
        has_bias = bias is not None
        _forward_kernel[grid](
            x, bias if has_bias else x, y, num_rows, width, has_bias, _fast(x), ROWS, COLUMNS, num_warps=4
        )
    return y


@on_its_device
def launch_backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients (dx [T, N], dbias [N], empty without a bias), by the kernel."""
    num_rows, width = x.shape
    has_bias = bias is not None
    dx = torch.empty_like(x)
    column_blocks = -(-width // COLUMNS)
    programs = max(1, min(PROGRAMS // max(1, column_blocks), -(-num_rows // ROWS)))
    partial = x.new_zeros(programs, width if has_bias else 0, dtype=torch.float32)
    if x.numel():
        _backward_kernel[(programs, column_blocks)](
            dy, x, bias if has_bias else x, dx, partial, num_rows, width, has_bias, _fast(x), ROWS, COLUMNS, num_warps=4
        )
    return dx, partial.sum(0).to(x.dtype if bias is None else bias.dtype)


# ---- reference: the CPU's body and the tests' oracle ----


def bias_gelu_reference(x: Tensor, bias: Tensor | None = None, upcast: bool = False) -> Tensor:
    """What `bias_gelu` computes, in torch; in fp64 if `upcast`."""
    if upcast:
        x, bias = x.double(), None if bias is None else bias.double()
    return functional.gelu(x if bias is None else (x + bias).to(x.dtype))


def _backward_reference(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    h = x if bias is None else (x + bias).to(x.dtype)
    dx = torch.ops.aten.gelu_backward(dy, h)
    if bias is None:
        return dx, x.new_empty(0)
    return dx, dx.sum(0, dtype=torch.float32).to(bias.dtype)


# ---- operators ----


def _forward(x: Tensor, bias: Tensor | None) -> Tensor:
    if runs_triton(x):
        return launch_forward(x, bias)
    return bias_gelu_reference(x, bias)


def _backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if runs_triton(x):
        return launch_backward(dy.contiguous(), x, bias)
    return _backward_reference(dy, x, bias)


_operator = torch.library.custom_op("fedbert_kernels::bias_gelu", _forward, mutates_args=())
_backward_operator = torch.library.custom_op("fedbert_kernels::bias_gelu_backward", _backward, mutates_args=())


@_operator.register_fake
def _(x: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@_backward_operator.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if bias is None else torch.empty_like(bias)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(backward: Callable[..., Any], ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    x, bias = ctx.saved_tensors
    dx, dbias = backward(dy, x, bias)
    return dx, None if bias is None else dbias


_bias_gelu = differentiable(_forward, _backward, (_operator, _backward_operator), _save, _differentiate)


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU, erf form, of x [..., N] + bias [N], in x's dtype; computed in fp32.

    The bias is of x's dtype or fp32. ValueError if shapes, dtypes or devices do not fit.
    """
    _check(x, bias)
    return _bias_gelu(x.reshape(-1, x.shape[-1]).contiguous(), bias).view(x.shape)


def _check(x: Tensor, bias: Tensor | None) -> None:
    if x.dtype not in FLOATS or x.dim() == 0:
        raise ValueError(f"bias_gelu: x must be [..., N] in fp32, fp16 or bf16, not {list(x.shape)} in {x.dtype}")
    if bias is None:
        return
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"bias_gelu: bias is {list(bias.shape)}, but x is {list(x.shape)}")
    if bias.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"bias_gelu: bias in {bias.dtype} with x in {x.dtype}; it must be x's dtype or fp32")
    if bias.device != x.device:
        raise ValueError(f"bias_gelu: bias on {bias.device}, x on {x.device}")


# ---- what compiles without a GPU ----


def compile_cases() -> list[CompileCase]:
    """Both kernels in each dtype."""
    cases = []
    for dtype in ("bf16", "fp16", "fp32"):
        constants = {"HAS_BIAS": True, "FAST": dtype != "fp32", "ROWS": 2, "COLUMNS": COLUMNS}
        sizes = {"num_rows": "i32", "width": "i32"}
        inputs, options = {"x_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}"}, {"num_warps": 4}
        forward = {**inputs, "y_ptr": f"*{dtype}", **sizes}
        backward = {"dy_ptr": f"*{dtype}", **inputs, "dx_ptr": f"*{dtype}", "partial_ptr": "*fp32", **sizes}
        cases.append(CompileCase(f"gelu_forward {dtype}", _forward_kernel, forward, constants, options, ("width",)))
        cases.append(CompileCase(f"gelu_backward {dtype}", _backward_kernel, backward, constants, options, ("width",)))
    return cases
