"""LayerNorm(residual + dropout(x + bias)) in one pass, and its backward.

The matrix product before it is torch's. Backward recomputes the sum from x and the residual, which
are kept for other reasons: it moves no more bytes than a saved sum would, and rounds nothing in
between. The dropout mask is drawn again from the seed. Gradients of the parameters are summed in
two stages in a fixed order: the same input always gives the same bits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedbert_kernels.compile_case import CompileCase
from fedbert_kernels.differentiable import differentiable
from fedbert_kernels.interpreter import INTERPRETED, jit, jit_for_any, narrow, on_its_device, runs_triton, tl
from fedbert_kernels.row_philox import LEVELS, random_16, random_16_reference, row_drop_threshold

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_WIDTH = 8192
"""A row must fit the registers of one program."""

# ---- kernels ----


@jit
def _sum_of_branches(
    x_ptr,
    residual_ptr,
    bias,
    seed_ptr,
    rows,
    columns,
    offsets,
    inside,
    HAS_RESIDUAL: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """residual + dropout(x + bias) in fp32, and the mask of kept elements."""
    h = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    keep = inside
    if THRESHOLD > 0:
        keep = random_16(seed_ptr, rows[:, None], columns[None, :]) >= THRESHOLD
        h = tl.where(keep, h * (65536 / (65536 - THRESHOLD)), 0.0)
    if HAS_RESIDUAL:
        h += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    return h, keep


@jit
def _load_vector(pointer, columns, inside, PRESENT: tl.constexpr):
    """A parameter in fp32; zeros if the layer has none."""
    if PRESENT:
        return tl.load(pointer + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.zeros(columns.shape, tl.float32)


@jit_for_any("num_rows")
def _forward_kernel(
    x_ptr,  # [num_rows, width]
    residual_ptr,  # [num_rows, width]; unused without HAS_RESIDUAL
    bias_ptr,  # [width]; unused without HAS_BIAS
    weight_ptr,  # [width]
    shift_ptr,  # [width]; unused without HAS_SHIFT
    seed_ptr,  # [2] int64: seed and offset; unused if THRESHOLD is 0
    y_ptr,  # [num_rows, width]
    mean_ptr,  # [num_rows] fp32
    rstd_ptr,  # [num_rows] fp32
    num_rows,
    width,
    epsilon,
    THRESHOLD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    row_inside, column_inside = rows < num_rows, columns < width
    inside = row_inside[:, None] & column_inside[None, :]
    # int64: a packed batch times the hidden size can pass 2**31.
    offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
    bias = _load_vector(bias_ptr, columns, column_inside, HAS_BIAS)
    h, _ = _sum_of_branches(
        x_ptr, residual_ptr, bias, seed_ptr, rows, columns, offsets, inside, HAS_RESIDUAL, THRESHOLD
    )
    mean = tl.sum(h, axis=1) / width
    centered = tl.where(inside, h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / width + epsilon)
    weight = _load_vector(weight_ptr, columns, column_inside, True)
    shift = _load_vector(shift_ptr, columns, column_inside, HAS_SHIFT)
    y = centered * rstd[:, None] * weight[None, :] + shift[None, :]
    tl.store(y_ptr + offsets, narrow(y, y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + rows, mean, mask=row_inside)
    tl.store(rstd_ptr + rows, rstd, mask=row_inside)


@jit_for_any("num_rows")
def _backward_kernel(
    dy_ptr,  # [num_rows, width]
    x_ptr,  # [num_rows, width]
    residual_ptr,  # [num_rows, width]; unused without HAS_RESIDUAL
    bias_ptr,  # [width]; unused without HAS_BIAS
    weight_ptr,  # [width]
    seed_ptr,  # [2] int64; unused if THRESHOLD is 0
    mean_ptr,  # [num_rows] fp32
    rstd_ptr,  # [num_rows] fp32
    dx_ptr,  # [num_rows, width]
    dresidual_ptr,  # [num_rows, width]; written only with a residual and dropout, else dx
    partial_ptr,  # [programs, 3, width] fp32: a program's share of weight, shift and bias gradients
    num_rows,
    width,
    THRESHOLD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)
    column_inside = columns < width
    weight = _load_vector(weight_ptr, columns, column_inside, True)
    bias = _load_vector(bias_ptr, columns, column_inside, HAS_BIAS)
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dshift = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        row_inside = rows < num_rows
        inside = row_inside[:, None] & column_inside[None, :]
        offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
        h, keep = _sum_of_branches(
            x_ptr, residual_ptr, bias, seed_ptr, rows, columns, offsets, inside, HAS_RESIDUAL, THRESHOLD
        )
        mean = tl.load(mean_ptr + rows, mask=row_inside, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=row_inside, other=0.0)
        dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        normalized = (h - mean[:, None]) * rstd[:, None]
        # Outside, dy is 0, so none of the sums below needs a mask.
        dnormalized = dy * weight[None, :]
        along = tl.sum(dnormalized * normalized, axis=1) / width
        average = tl.sum(dnormalized, axis=1) / width
        dh = (dnormalized - normalized * along[:, None] - average[:, None]) * rstd[:, None]
        dx = dh
        if THRESHOLD > 0:
            dx = tl.where(keep, dh * (65536 / (65536 - THRESHOLD)), 0.0)
            if HAS_RESIDUAL:
                tl.store(dresidual_ptr + offsets, narrow(dh, dresidual_ptr.dtype.element_ty), mask=inside)
        tl.store(dx_ptr + offsets, narrow(dx, dx_ptr.dtype.element_ty), mask=inside)
        dweight += dy * normalized
        dshift += dy
        if HAS_BIAS:
            dbias += dx
    partial_ptr += tl.program_id(0) * 3 * width + columns
    tl.store(partial_ptr, tl.sum(dweight, axis=0), mask=column_inside)
    tl.store(partial_ptr + width, tl.sum(dshift, axis=0), mask=column_inside)
    tl.store(partial_ptr + 2 * width, tl.sum(dbias, axis=0), mask=column_inside)


# ---- launch functions ----

FORWARD_VALUES, BACKWARD_VALUES = 2048, 1024
"""Values of a block: 16 a thread; 8 in backward, where the parameters' sums take registers."""
PROGRAMS = 528
"""Programs of backward: four a multiprocessor of the largest card; constant, so all sum alike."""


def _tile(width: int, values: int) -> dict[str, int]:
    """Rows and columns of a block of about `values` values, and its warps."""
    columns = 1 << (width - 1).bit_length()
    rows = max(1, (8192 if INTERPRETED else values) // columns)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": min(16, max(4, columns // 256))}


@on_its_device
def launch_forward(
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    threshold: int,
    epsilon: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm [T, H], means [T] and reciprocal deviations [T], by the kernel."""
    num_rows, width = x.shape
    y, mean, rstd = _empty_outputs(x)
    if num_rows:
        tile = _tile(width, FORWARD_VALUES)
        _forward_kernel[(-(-num_rows // tile["ROWS"]),)](
            x, _or(residual, x), _or(bias, x), weight, _or(shift, x), _or(seed, x), y, mean, rstd,
            num_rows, width, epsilon,
            THRESHOLD=threshold, HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None,
            HAS_SHIFT=shift is not None, **tile,
        )  # fmt: skip
    return y, mean, rstd


@on_its_device
def launch_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    threshold: int,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, bias, weight and shift, by the kernel.

    `_empty_gradients` says which are empty.
    """
    num_rows, width = x.shape
    dx, dresidual, dbias, dweight, dshift = _empty_gradients(x, residual, bias, weight, shift, threshold)
    tile = _tile(width, BACKWARD_VALUES)
    programs = max(1, min(PROGRAMS, -(-num_rows // tile["ROWS"])))
    partial = x.new_zeros(programs, 3, width, dtype=torch.float32)
    if num_rows:
        _backward_kernel[(programs,)](
            dy, x, _or(residual, x), _or(bias, x), weight, _or(seed, x), mean, rstd, dx, dresidual, partial,
            num_rows, width,
            THRESHOLD=threshold, HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, **tile,
        )  # fmt: skip
    weight_sum, shift_sum, bias_sum = partial.sum(0)
    dweight.copy_(weight_sum)
    if shift is not None:
        dshift.copy_(shift_sum)
    if bias is not None:
        dbias.copy_(bias_sum)
    return dx, dresidual, dbias, dweight, dshift


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    # A pointer that the kernel never reads still needs a value.
    return placeholder if tensor is None else tensor


def _empty_outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[0], dtype=torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _empty_gradients(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, weight: Tensor, shift: Tensor | None, threshold: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Unfilled gradients of x, residual, bias, weight and shift.

    Empty for absent parts, and for a residual whose gradient is x's.
    """
    separate = residual is not None and threshold > 0
    return (
        torch.empty_like(x),
        torch.empty_like(x) if separate else x.new_empty(0),
        x.new_empty(0) if bias is None else torch.empty_like(bias),
        torch.empty_like(weight),
        x.new_empty(0) if shift is None else torch.empty_like(shift),
    )


# ---- reference: the tests' oracle, and the CPU's body ----


def keep_mask_reference(seed: Tensor, num_rows: int, width: int, dropout: float) -> Tensor:
    """[num_rows, width] bool: what dropout keeps."""
    return random_16_reference(seed, num_rows, width) >= row_drop_threshold(dropout)


def residual_layer_norm_reference(
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    dropout: float = 0.0,
    epsilon: float = 1e-12,
    seed: Tensor | None = None,
    upcast: bool = False,
) -> Tensor:
    """The same as `residual_layer_norm` in plain torch, in fp64 if `upcast`; x is [T, H]."""
    if upcast:
        x, weight = x.double(), weight.double()
        residual, bias, shift = (None if part is None else part.double() for part in (residual, bias, shift))
    h = x if bias is None else (x + bias).to(x.dtype)
    if dropout and seed is not None:
        kept = keep_mask_reference(seed, x.shape[0], x.shape[1], dropout)
        h = h * kept * (LEVELS / (LEVELS - row_drop_threshold(dropout)))
    h = h if residual is None else h + residual
    shift = None if shift is None else shift.to(x.dtype)
    return functional.layer_norm(h, x.shape[1:], weight.to(x.dtype), shift, epsilon)


def _sum_in_torch(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, threshold: int, seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """residual + dropout(x + bias) in fp32, and dropout's factor of each x (None without)."""
    h = x.float() if bias is None else x.float() + bias
    factor = None
    if threshold and seed is not None:
        factor = (random_16_reference(seed, *x.shape) >= threshold) * (LEVELS / (LEVELS - threshold))
        factor = factor.float()
        h = h * factor
    return (h if residual is None else h + residual), factor


def _forward_in_torch(x, residual, bias, weight, shift, threshold, epsilon, seed) -> tuple[Tensor, Tensor, Tensor]:
    h, _ = _sum_in_torch(x, residual, bias, threshold, seed)
    shift = None if shift is None else shift.float()
    y, mean, rstd = torch.native_layer_norm(h, x.shape[1:], weight.float(), shift, epsilon)
    return y.to(x.dtype), mean.flatten(), rstd.flatten()


def _backward_in_torch(
    dy, x, residual, bias, weight, shift, mean, rstd, threshold, seed
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dresidual, dbias, dweight, dshift = _empty_gradients(x, residual, bias, weight, shift, threshold)
    h, factor = _sum_in_torch(x, residual, bias, threshold, seed)
    dh, weight_sum, shift_sum = torch.ops.aten.native_layer_norm_backward(
        dy.float(), h, x.shape[1:], mean[:, None], rstd[:, None], weight.float(), weight.float(), [True, True, True]
    )
    dropped = dh if factor is None else dh * factor
    dx.copy_(dropped)
    dweight.copy_(weight_sum)
    if dresidual.numel():
        dresidual.copy_(dh)
    if bias is not None:
        dbias.copy_(dropped.sum(0))
    if shift is not None:
        dshift.copy_(shift_sum)
    return dx, dresidual, dbias, dweight, dshift


# ---- operators ----


def _forward(
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    threshold: int,
    epsilon: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    forward = launch_forward if runs_triton(x) else _forward_in_torch
    return forward(x, residual, bias, weight, shift, threshold, epsilon, seed)


def _backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    threshold: int,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    backward = launch_backward if runs_triton(x) else _backward_in_torch
    return backward(dy.contiguous(), x, residual, bias, weight, shift, mean, rstd, threshold, seed)


_operator = torch.library.custom_op("fedbert_kernels::residual_layer_norm", _forward, mutates_args=())
_backward_operator = torch.library.custom_op(
    "fedbert_kernels::residual_layer_norm_backward", _backward, mutates_args=()
)


@_operator.register_fake
def _(x, residual, bias, weight, shift, threshold, epsilon, seed):
    return _empty_outputs(x)


@_backward_operator.register_fake
def _(dy, x, residual, bias, weight, shift, mean, rstd, threshold, seed):
    return _empty_gradients(x, residual, bias, weight, shift, threshold)


def _save(ctx, inputs, output) -> None:
    x, residual, bias, weight, shift, threshold, _, seed = inputs
    _, mean, rstd = output
    ctx.threshold = threshold
    ctx.save_for_backward(x, residual, bias, weight, shift, mean, rstd, seed)
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate(backward: Callable[..., Any], ctx: Any, dy: Tensor, *_: Tensor | None):
    x, residual, bias, weight, shift, mean, rstd, seed = ctx.saved_tensors
    dx, dresidual, dbias, dweight, dshift = backward(
        dy, x, residual, bias, weight, shift, mean, rstd, ctx.threshold, seed
    )
    if not ctx.threshold:
        dresidual = dx
    gradients = ((x, dx), (residual, dresidual), (bias, dbias), (weight, dweight), (shift, dshift))
    return *(None if part is None else gradient for part, gradient in gradients), None, None, None


_residual_layer_norm = differentiable(_forward, _backward, (_operator, _backward_operator), _save, _differentiate)


def residual_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    dropout: float = 0.0,
    epsilon: float = 1e-12,
    seed: Tensor | None = None,
) -> Tensor:
    """LayerNorm(residual + dropout(x + bias)) * weight + shift, of x's shape [..., H] and dtype.

    Statistics are in fp32. The parameters [H] are each of x's dtype or fp32. The dropout mask
    follows from `seed`, [2] int64 (seed, offset), of which the low 32 bits of the offset count; the
    same pair gives the same mask on every device. None draws a seed from torch's generator, so
    activation checkpointing draws the same one again. The drop probability is rounded to a multiple
    of 1 / 65536, and kept values are scaled by the rounded rate. ValueError if shapes, dtypes or
    devices do not fit.
    """
    _check(x, residual, bias, weight, shift, seed)
    threshold = row_drop_threshold(dropout)
    if threshold and seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (2,), device=x.device)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    residual = None if residual is None else residual.reshape(rows.shape).contiguous()
    seed = seed if threshold else None
    return _residual_layer_norm(rows, residual, bias, weight, shift, threshold, epsilon, seed)[0].view(x.shape)


def _check(
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    seed: Tensor | None,
) -> None:
    name = "residual_layer_norm"
    if x.dtype not in FLOATS or x.dim() == 0 or not 0 < x.shape[-1] <= LARGEST_WIDTH:
        raise ValueError(
            f"{name}: x must be [..., H] in fp32, fp16 or bf16 with H from 1 to {LARGEST_WIDTH}, "
            f"not {list(x.shape)} in {x.dtype}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"{name}: residual is {list(residual.shape)} in {residual.dtype}, but x is {list(x.shape)} in {x.dtype}"
        )
    for what, part in (("bias", bias), ("weight", weight), ("shift", shift)):
        if part is not None and (part.shape != x.shape[-1:] or part.dtype not in (x.dtype, torch.float32)):
            raise ValueError(
                f"{name}: {what} is {list(part.shape)} in {part.dtype}; with x {list(x.shape)} in {x.dtype} it must be "
                f"[{x.shape[-1]}] in {x.dtype} or fp32"
            )
    if seed is not None and (seed.shape != (2,) or seed.dtype != torch.int64):
        raise ValueError(f"{name}: seed must be [2] int64, not {list(seed.shape)} {seed.dtype}")
    devices = {part.device for part in (x, residual, bias, weight, shift, seed) if part is not None}
    if len(devices) > 1:
        raise ValueError(f"{name}: arguments on different devices: {', '.join(sorted(map(str, devices)))}")


# ---- what compiles without a GPU ----


def compile_cases() -> list[CompileCase]:
    """Both kernels in each dtype at BERT's widths (one tile) and at the largest."""
    tenth = row_drop_threshold(0.1)
    drawn = [("bf16", 768, tenth), ("bf16", 768, 0), ("bf16", LARGEST_WIDTH, tenth)]
    drawn += [("fp16", 1024, tenth), ("fp32", 1024, tenth)]
    return [case for dtype, width, threshold in drawn for case in _compile_cases_of(dtype, width, threshold)]


def _compile_cases_of(dtype: str, width: int, threshold: int) -> list[CompileCase]:
    names = ("x", "residual", "bias", "weight", "shift", "y", "dy", "dx", "dresidual")
    types = {f"{name}_ptr": f"*{dtype}" for name in names}
    types |= {"seed_ptr": "*i64", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "partial_ptr": "*fp32"}
    types |= {"num_rows": "i32", "width": "i32", "epsilon": "fp32"}
    flags = {"THRESHOLD": threshold, "HAS_RESIDUAL": True, "HAS_BIAS": True, "HAS_SHIFT": True}
    cases = []
    for name, kernel, values in (
        ("forward", _forward_kernel, FORWARD_VALUES),
        ("backward", _backward_kernel, BACKWARD_VALUES),
    ):
        tile = _tile(width, values)
        options = {"num_warps": tile.pop("num_warps")}
        signature = {argument: types[argument] for argument in kernel.arg_names if argument in types}
        constants = {argument: value for argument, value in {**flags, **tile}.items() if argument in kernel.arg_names}
        label = f"layer_norm_{name} {dtype} h{width}{' dropout' if threshold else ''}"
        # At the largest width, three sums of 16 values a thread spill 30 words a row of 80 KB.
        spill_free = width < LARGEST_WIDTH
        cases.append(CompileCase(label, kernel, signature, constants, options, ("width",), spill_free=spill_free))
    return cases
