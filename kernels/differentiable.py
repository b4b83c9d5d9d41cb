"""An operator to a compiler, an autograd function to everybody else.

torch.compile takes a `torch.library.custom_op` as it is, where it could not look into the launch of
a kernel. Without a compiler such an operator takes the host twice as long as an autograd function
around the same code, four times a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def differentiable(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    operators: tuple[Any, Any],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    differentiate: Callable[..., Any],
) -> Callable[..., Any]:
    """A function of `forward`'s arguments, the first of which is a tensor.

    `operators` are custom operators of `forward` and `backward`. `save(ctx, inputs, output)` is as
    `setup_context` of `register_autograd`; `differentiate(backward, ctx, *gradients)` returns a
    gradient for each argument, and is given the function or the operator.
    """
    operator, backward_operator = operators
    operator.register_autograd(partial(differentiate, backward_operator), setup_context=save)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            ctx.set_materialize_grads(False)
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Any) -> Any:
            return differentiate(backward, ctx, *gradients)

    def call(*inputs: Any) -> Any:
        return (Eager.apply if is_eager(inputs[0]) else operator)(*inputs)

    return call


def is_eager(tensor: Tensor) -> bool:
    """Whether a kernel may run now: no compiler looks, and the tensor has values."""
    return not torch.compiler.is_compiling() and type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta
