"""LayerNorm and GELU by torch.compile: the kernels' baselines and stand-ins.

Bias, dropout and residual are compiled with them. One compilation serves any number of rows; widths
are constants, as in the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def compiled_bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU (erf form) of x [..., N] + bias [N], in x's dtype: the same as `gelu.bias_gelu`."""
    return _by_compiler(_bias_gelu, (x,), (bias,))


def compiled_residual_layer_norm(
    x: Tensor, residual: Tensor, bias: Tensor, weight: Tensor, shift: Tensor | None, dropout: float, epsilon: float
) -> Tensor:
    """LayerNorm of residual + dropout(x + bias): the same as `layer_norm.residual_layer_norm`.

    x, residual and the result are [..., W] in one dtype; the others are [W]. Dropout follows
    torch's generator, as the kernel does, with other numbers.
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
    # A model compiled as a whole fuses this too. Zero rows, and one, would each be compiled apart.
    if torch.compiler.is_compiling() or len(flat[0]) < 2:
        return function(*rows, *parameters, **numbers)
    for tensor in flat:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return compiled(function, **numbers)(*flat, *parameters).view(shape)


@functools.cache
def compiled(function: Callable[..., Tensor], **numbers: float) -> Callable[..., Tensor]:
    """The function compiled for these numbers, once a process."""
    # Only marked sizes vary: by default torch.compile makes variables of numbers it saw change.
    return torch.compile(lambda *tensors: function(*tensors, **numbers), dynamic=False)
