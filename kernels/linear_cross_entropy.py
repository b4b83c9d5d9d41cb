"""Linear layer + cross-entropy, summed over rows, without a tensor [rows, vocabulary].

Scores exist for one chunk of rows at a time, in one buffer: torch multiplies into it, a kernel
turns the scores into their gradient in place, and torch multiplies that into the gradients of
hidden states, weight and bias. The gradients are thus made in forward; backward only scales them.
Matrix products are torch's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedbert_kernels.compile_case import CompileCase
from fedbert_kernels.differentiable import differentiable
from fedbert_kernels.interpreter import jit, narrow, on_its_device, runs_triton, tl

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# ---- kernels ----


@jit
def _cross_entropy_kernel(
    scores_ptr,  # [num_rows, width], which become the gradient of the loss
    bias_ptr,  # [width] fp32, minus infinity beyond the vocabulary: a gradient of 0 there
    targets_ptr,  # [num_rows] int64
    losses_ptr,  # [num_rows] fp32
    width,
    ignore_index,
    WITH_GRADIENT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    scores_ptr += row.to(tl.int64) * width
    target = tl.load(targets_ptr + row)
    ignored = target == ignore_index
    known = (target >= 0) & (target < width)
    # Loaded before the first reduction, whose barrier keeps the second loop's stores behind it.
    target_score = tl.load(scores_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    target_score += tl.load(bias_ptr + target, mask=known, other=0.0)

    largest = float("-inf")
    total = 0.0
    for first in range(0, width, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        scores = tl.load(scores_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
        scores += tl.load(bias_ptr + columns, mask=columns < width, other=float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(scores - new_largest), axis=0)
        largest = new_largest
    # Not largest + log(total) - target_score: the difference is small and keeps digits.
    tl.store(losses_ptr + row, tl.where(ignored, 0.0, tl.log(total) - (target_score - largest)))

    if WITH_GRADIENT:
        share = 1.0 / total
        for first in range(0, width, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            scores = tl.load(scores_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
            scores += tl.load(bias_ptr + columns, mask=columns < width, other=float("-inf"))
            gradient = tl.exp(scores - largest) * share - tl.where(columns == target, 1.0, 0.0)
            gradient = tl.where(ignored, 0.0, gradient)
            tl.store(scores_ptr + columns, narrow(gradient, scores_ptr.dtype.element_ty), mask=columns < width)


# ---- launch functions ----

COLUMNS = 4096
NUM_WARPS = 8
ALIGNMENT = 64
"""Score rows are a multiple of this: with 30,522 they would be unaligned, and products slow."""


@on_its_device
def launch_cross_entropy(
    scores: Tensor, bias: Tensor, targets: Tensor, ignore_index: int, with_gradient: bool
) -> Tensor:
    """Losses [rows] fp32 of scores [rows, width] + bias [width], by the kernel.

    Scores become their gradient in place. The bias is fp32, minus infinity beyond the vocabulary.
    """
    losses = scores.new_empty(len(scores), dtype=torch.float32)
    _cross_entropy_kernel[(len(scores),)](
        scores, bias, targets, losses, scores.shape[1], ignore_index, with_gradient, COLUMNS, num_warps=NUM_WARPS
    )
    return losses


# ---- reference: the CPU's body and the tests' oracle ----


def cross_entropy_in_place(
    scores: Tensor, bias: Tensor, targets: Tensor, ignore_index: int, with_gradient: bool
) -> Tensor:
    """The same as `launch_cross_entropy`, in torch."""
    log_probabilities = (scores.float() + bias).log_softmax(1)
    kept = targets != ignore_index
    rows, columns = kept.nonzero().squeeze(1), targets[kept]
    losses = log_probabilities.new_zeros(len(scores))
    losses[rows] = -log_probabilities[rows, columns]
    if with_gradient:
        gradient = log_probabilities.exp_()
        gradient[rows, columns] -= 1.0
        scores.copy_(gradient.mul_(kept[:, None]))
    return losses


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int = -100,
    upcast: bool = False,
) -> Tensor:
    """The same as `linear_cross_entropy`, with all scores in memory; in fp64 if `upcast`."""
    if upcast:
        hidden, weight, bias = hidden.double(), weight.double(), None if bias is None else bias.double()
    scores = functional.linear(hidden, weight)
    scores = scores if upcast else scores.float()
    scores = scores if bias is None else scores + bias
    return functional.cross_entropy(scores, targets, ignore_index=ignore_index, reduction="sum")


# ---- chunks ----


def _chunk_rows(hidden: Tensor, vocabulary: int) -> int:
    """Rows of a chunk: at most 128 MB on a device, 16 MB (about a cache) on a CPU."""
    budget = (128 << 20) if hidden.is_cuda else (16 << 20)
    return max(1, budget // (max(1, vocabulary) * hidden.element_size()))


def sum_over_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    with_gradient: bool,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, and the gradients of hidden [m, D], weight [V, D] and bias [V]; empty if not wanted."""
    vocabulary = weight.shape[0]
    cross_entropy = launch_cross_entropy if runs_triton(hidden) else cross_entropy_in_place
    width = -(-vocabulary // ALIGNMENT) * ALIGNMENT
    # Zeros, because the products leave out columns beyond the vocabulary.
    buffer = hidden.new_zeros(min(chunk_rows, len(hidden)), width)
    padded_bias = torch.full((width,), -torch.inf, device=hidden.device)
    padded_bias[:vocabulary] = 0.0 if bias is None else bias
    dhidden, dweight, dbias = _empty_gradients(hidden, weight, bias, with_gradient)
    losses = hidden.new_zeros(len(hidden), dtype=torch.float32)
    # Sums over chunks are in fp32: bf16 would lose what later chunks add.
    weight_sum = torch.zeros_like(dweight, dtype=torch.float32)
    bias_sum = torch.zeros_like(dbias, dtype=torch.float32)
    for first in range(0, len(hidden), chunk_rows):
        rows = slice(first, first + chunk_rows)
        padded_scores = buffer[: len(hidden[rows])]
        scores = padded_scores[:, :vocabulary]
        torch.mm(hidden[rows], weight.T, out=scores)
        losses[rows] = cross_entropy(padded_scores, padded_bias, targets[rows], ignore_index, with_gradient)
        if with_gradient:
            torch.mm(scores, weight, out=dhidden[rows])
            _add_product(weight_sum, scores.T, hidden[rows])
            if bias is not None:
                bias_sum += scores.sum(0, dtype=torch.float32)
    return losses.sum(), dhidden, dweight.copy_(weight_sum), dbias.copy_(bias_sum)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not with_gradient:
        return hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(hidden), torch.empty_like(weight), dbias


# ---- operators ----


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    with_gradient: bool,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if targets.device.type == "cpu":
        _check_targets(targets, weight.shape[0], ignore_index)
    return sum_over_chunks(hidden, weight, bias, targets, ignore_index, with_gradient, chunk_rows)


def _backward(dloss: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Through fp32: 1 / number of masked tokens is too small for fp16.
    dhidden, dweight, dbias = ((part.float() * dloss).to(part.dtype) for part in (dhidden, dweight, dbias))
    return dhidden, dweight, dbias


_operator = torch.library.custom_op("fedbert_kernels::linear_cross_entropy", _forward, mutates_args=())
_backward_operator = torch.library.custom_op(
    "fedbert_kernels::linear_cross_entropy_backward", _backward, mutates_args=()
)


@_operator.register_fake
def _(hidden, weight, bias, targets, ignore_index, with_gradient, chunk_rows):
    return hidden.new_empty((), dtype=torch.float32), *_empty_gradients(hidden, weight, bias, with_gradient)


@_backward_operator.register_fake
def _(dloss, dhidden, dweight, dbias):
    return torch.empty_like(dhidden), torch.empty_like(dweight), torch.empty_like(dbias)


def _save(ctx, inputs, output) -> None:
    _, _, bias, _, _, with_gradient, _ = inputs
    _, *gradients = output
    ctx.has_bias, ctx.with_gradient = bias is not None, with_gradient
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(*gradients)


def _differentiate(backward: Callable[..., Any], ctx: Any, dloss: Tensor, *_: Tensor | None):
    if not ctx.with_gradient:
        raise RuntimeError("linear_cross_entropy was called without gradients; there is no backward")
    dhidden, dweight, dbias = backward(dloss, *ctx.saved_tensors)
    return dhidden, dweight, dbias if ctx.has_bias else None, None, None, None, None


_linear_cross_entropy = differentiable(_forward, _backward, (_operator, _backward_operator), _save, _differentiate)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum of cross-entropies in nats (fp32 scalar) of hidden [m, D] @ weight [V, D]^T + bias [V].

    m may be 0. `targets` is [m] int64; a row whose target is `ignore_index` adds nothing. A chunk
    has `chunk_rows` rows, by default as many as fit a fixed buffer. ValueError if shapes, dtypes or
    devices do not fit. A target outside the vocabulary is a ValueError on a CPU. Elsewhere, where a
    check would wait for the device, it makes the loss NaN or infinite.
    """
    _check(hidden, weight, bias, targets)
    if chunk_rows is None:
        chunk_rows = _chunk_rows(hidden, weight.shape[0])
    elif chunk_rows < 1:
        raise ValueError(f"linear_cross_entropy: chunk_rows is {chunk_rows}, but a chunk has at least one row")
    parts = [part for part in (hidden, weight, bias) if part is not None]
    with_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    return _linear_cross_entropy(
        hidden.contiguous(), weight.contiguous(), bias, targets.contiguous(), ignore_index, with_gradient, chunk_rows
    )[0]


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    name = "linear_cross_entropy"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not weight.shape[0]:
        raise ValueError(f"{name}: hidden and weight must be [m, D] and [V, D], not {hidden.shape} and {weight.shape}")
    if hidden.dtype != weight.dtype or hidden.dtype not in FLOATS:
        raise ValueError(f"{name}: hidden in {hidden.dtype}, weight in {weight.dtype}; both fp32, fp16 or bf16")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype not in (weight.dtype, torch.float32)):
        raise ValueError(f"{name}: bias {list(bias.shape)} in {bias.dtype} does not fit weight {list(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"{name}: targets must be [{len(hidden)}] int64, not {list(targets.shape)} {targets.dtype}")
    devices = {part.device for part in (hidden, weight, bias, targets) if part is not None}
    if len(devices) > 1:
        raise ValueError(f"{name}: arguments on different devices: {', '.join(sorted(map(str, devices)))}")


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    counted = targets[targets != ignore_index]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < vocabulary:
        raise ValueError(f"linear_cross_entropy: a target is outside the vocabulary of {vocabulary}")


# ---- what compiles without a GPU ----


def compile_cases() -> list[CompileCase]:
    """The kernel in each dtype, with and without gradient."""
    cases = []
    for dtype, with_gradient in (("bf16", True), ("bf16", False), ("fp16", True), ("fp32", True)):
        signature = {"scores_ptr": f"*{dtype}", "bias_ptr": "*fp32", "targets_ptr": "*i64", "losses_ptr": "*fp32"}
        signature |= {"width": "i32", "ignore_index": "i32"}
        constants = {"WITH_GRADIENT": with_gradient, "COLUMNS": COLUMNS}
        name = f"cross_entropy {dtype}{'' if with_gradient else ' loss only'}"
        options = {"num_warps": NUM_WARPS}
        cases.append(CompileCase(name, _cross_entropy_kernel, signature, constants, options, ("width",)))
    return cases
