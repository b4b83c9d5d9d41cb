"""The optimizer of a client half, the same arithmetic at a client and at the aggregator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fedbert_ds.config import OptimizerSection
from fedbert_ds.model.optimizer import build_optimizer

OptimizerState = dict[str, dict[str, Tensor | int | float]]
"""What an optimizer remembers of each parameter, by the parameter's name and its own."""


class HalfOptimizer:
    """Steps the parameters of a client half, by the run file's optimizer and schedule.

    `clips` says that the half's gradient is clipped here, apart from the body's.
    """

    def __init__(
        self, parameters: Mapping[str, Parameter], section: OptimizerSection, num_windows: int, clips: bool
    ) -> None:
        self._parameters = dict(parameters)
        self._optimizer = build_optimizer(list(parameters.items()), section)
        self._section, self._num_windows = section, num_windows
        self._clipping = section.gradient_clipping if clips else 0.0

    def step(self, window: int) -> None:
        """Step with the gradients in the parameters, which are then gone."""
        if self._clipping:
            torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._clipping)
        for group in self._optimizer.param_groups:
            group["lr"] = self._section.learning_rate(window, self._num_windows)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def step_with(self, gradients: Mapping[str, Tensor], window: int) -> None:
        """Step with these gradients, which stay as they are; so do those in the parameters."""
        accumulated = {name: parameter.grad for name, parameter in self._parameters.items()}
        for name, gradient in gradients.items():
            gradient = gradient.to(self._parameters[name].device)
            # Clipping works in place, and others may hold the gradients.
            self._parameters[name].grad = gradient.clone() if self._clipping else gradient
        self.step(window)
        for name, gradient_so_far in accumulated.items():
            self._parameters[name].grad = gradient_so_far

    def zero_grad(self) -> None:
        """Drop the gradients in the parameters."""
        self._optimizer.zero_grad()

    def state(self) -> OptimizerState:
        """What the optimizer remembers; empty before its first step. Tensors are its own, not
        copies.
        """
        state = self._optimizer.state_dict()["state"]
        return {name: dict(state[number]) for number, name in enumerate(self._order()) if number in state}

    def load_state(self, state: OptimizerState) -> None:
        """Go on from `state`; tensors move to the parameters' device."""
        numbers = {name: number for number, name in enumerate(self._order())}
        groups: list[dict[str, Any]] = self._optimizer.state_dict()["param_groups"]
        for group in groups:
            # NVIDIA apex counts steps in the group; torch keeps them with each parameter.
            names = [name for name, number in numbers.items() if number in group["params"] and name in state]
            if names and type(self._optimizer).__module__.startswith("apex"):
                group["step"] = int(state[names[0]]["step"])
        by_number = {numbers[name]: dict(values) for name, values in state.items()}
        self._optimizer.load_state_dict({"state": by_number, "param_groups": groups})

    def _order(self) -> list[str]:
        """Names of the parameters as the optimizer numbers them."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        return [names[id(parameter)] for group in self._optimizer.param_groups for parameter in group["params"]]
