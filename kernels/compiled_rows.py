"""LayerNorm and GELU with what stands around them, by torch.compile: the kernels' baselines and stand-ins.

One compilation serves any number of rows; widths are constants in it, as they are in the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def compiled_bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU, erf form, of x [..., N] + bias [N], in x's dtype: what `gelu.bias_gelu` computes."""
    return _by_compiler(_bias_gelu, (x,), (bias,))


def compiled_residual_layer_norm(
    x: Tensor, residual: Tensor, bias: Tensor, weight: Tensor, shift: Tensor | None, dropout: float, epsilon: float
) -> Tensor:
    """LayerNorm of residual + dropout(x + bias): what `layer_norm.residual_layer_norm` computes.

    x and residual are [..., W] in one dtype, which the result has too; the others are [W]. Dropout draws from torch's
    generator, as the kernel does, but other numbers.
    """
    parameters = (bias, weight, shift)
    return _by_compiler(_residual_layer_norm, (x, residual), parameters, dropout=dropout, epsilon=epsilon)


def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(x + bias.to(x.dtype))


def _residual_layer_norm(
    x: Tensor, residual: Tensor, bias: Tensor, weight: Tensor, shift: Tensor | None, dropout: float, epsilon: float
) -> Tensor:
    h = residual + functional.dropout(x + bias.to(x.dtype), dropout)
    shift = None if shift is None else shift.to(h.dtype)
    return functional.layer_norm(h, h.shape[-1:], weight.to(h.dtype), shift, epsilon)


def _by_compiler(
    function: Callable[..., Tensor], rows: tuple[Tensor, ...], parameters: tuple[Tensor | None, ...], **numbers: float
) -> Tensor:
    shape = rows[0].shape
    flat = [tensor.reshape(-1, shape[-1]) for tensor in rows]
    # Whoever compiles the whole model fuses this too. No row, and a single one, would each be compiled for nothing.
    if torch.compiler.is_compiling() or len(flat[0]) < 2:
        return function(*rows, *parameters, **numbers)
    for tensor in flat:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return compiled(function, **numbers)(*flat, *parameters).view(shape)


@functools.cache
def compiled(function: Callable[..., Tensor], **numbers: float) -> Callable[..., Tensor]:
    """The function as torch.compile makes it for these numbers, kept for as long as the process runs."""
    # Nothing varies but what is marked: torch.compile would make variables of numbers and widths that it saw changing.
    return torch.compile(lambda *tensors: function(*tensors, **numbers), dynamic=False)
