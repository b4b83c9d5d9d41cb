"""Forwards and backwards of a body under DeepSpeed, in any order, at every ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fedbert_ds.model.dropout_seed import seed_dropout
from fedbert_ds.server.body.device_work import Device
from fedbert_ds.server.body.layer_weights import LayerWeights
from fedbert_ds.server.body.packed_input import BodyInput
from fedbert_ds.server.body.window_gradient import WindowGradient


class Passes:
    """Runs the body of DeepSpeed's `engine`; `gradient` adds up what its parameters get.

    At stage 3 all ranks run the same passes in the same order. `masters` as `WindowGradient`'s.
    """

    def __init__(self, engine: Any, stage: int, masters: Mapping[Tensor, Tensor], device: Device) -> None:
        self._body = engine.module
        self._device = device
        self.gradient = WindowGradient(engine, stage, masters)
        self._weights = LayerWeights(engine, engine.module) if stage == 3 else None

    def forward(self, body_input: BodyInput, activations: Tensor) -> Tensor:
        """Hidden states of masked positions, for the values of the input's activations."""
        if self._body.training:  # else no random number is drawn
            seed_dropout(body_input.seed, self._device.device)
        # Not DeepSpeed's forward: it prepares for a backward that lets ranks meet.
        with nullcontext() if self._weights is None else self._weights.forward():
            hidden: Tensor = self._body(
                activations, body_input.masked_positions, body_input.cu_seqlens, body_input.row_index
            )
        return hidden

    def backward(self, hidden: Tensor, gradient: Tensor, activations: Tensor, adds_up: bool = True) -> Tensor:
        """d/d(activations), where `gradient` is d/d(hidden); parameters' gradients are added up, or
        are not.
        """
        with nullcontext() if self._weights is None else self._weights.backward():
            return self.gradient.backward(hidden, gradient, activations, adds_up)

    def both(self, body_input: BodyInput, gradient: Tensor | None = None) -> None:
        """A forward and its backward; without a gradient all of it counts nothing."""
        activations = body_input.values(self._body.input_dtype).requires_grad_(True)
        hidden = self.forward(body_input, activations)
        self.backward(hidden, torch.zeros_like(hidden) if gradient is None else gradient, activations)

    def renew(self) -> None:
        """Take over what a step or a checkpoint has made of the weights; all ranks together."""
        if self._weights is not None:
            self._weights.renew()

    def weights_lent(self) -> AbstractContextManager[None]:
        """Inside, DeepSpeed's checkpoints find weights as they expect them."""
        return nullcontext() if self._weights is None else self._weights.lent()
