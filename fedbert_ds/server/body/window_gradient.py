"""A window's gradient: summed here in fp32, then given to DeepSpeed in one backward.

DeepSpeed sums in the weights' precision, and at ZeRO stage 2 ranks meet in every backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from torch import Tensor


class WindowGradient:
    """Sums gradients of a body under DeepSpeed, at stages that keep its parameters whole."""

    def __init__(self, engine: Any, world_size: int) -> None:
        self._engine = engine
        self._world_size = world_size
        self._parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self._sums: list[Tensor | None] = [None] * len(self._parameters)

    def backward(self, outputs: Tensor, gradient: Tensor, inputs: Tensor) -> Tensor:
        """d/d(inputs), where `gradient` is d/d(outputs); the parameters' gradients are added up."""
        of_inputs, *of_parameters = torch.autograd.grad(
            outputs, [inputs, *self._parameters], gradient.to(outputs.dtype), allow_unused=True
        )
        self._add(of_parameters)
        assert of_inputs is not None
        return of_inputs

    def give(self) -> None:
        """Let DeepSpeed have the sums, as if of one backward; all ranks call it. Then there are
        none.
        """
        # DeepSpeed averages gradients over ranks; the window's loss is a sum over ranks.
        gradients = [
            None if total is None else (total * self._world_size).to(parameter.dtype)
            for total, parameter in zip(self._sums, self._parameters, strict=True)
        ]
        self.drop()
        loss = _Gradients.apply(gradients, *self._parameters)
        # What DeepSpeed's own forward does for a backward.
        if isinstance(self._engine.optimizer, ZeROOptimizer):
            self._engine.optimizer.clear_backward_seen_flag()
        loss.register_hook(lambda _: self._engine._backward_prologue())
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(loss)

    def drop(self) -> None:
        """Forget the sums."""
        self._sums = [None] * len(self._parameters)

    def _add(self, gradients: Sequence[Tensor | None]) -> None:
        totals, added = [], []
        for number, gradient in enumerate(gradients):
            total = self._sums[number]
            if gradient is None:
                continue
            if total is None:
                # Two parameters may get one tensor.
                self._sums[number] = gradient.to(torch.float32, copy=True)
            else:
                totals.append(total)
                added.append(gradient)
        if totals:
            torch._foreach_add_(totals, added)


class _Gradients(torch.autograd.Function):
    """A scalar that has these gradients."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return None, *ctx.gradients
