"""Faults put into the server on purpose, to see that the equality tests notice them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from fedbert_ds.server.engine import BodyEngine


@contextmanager
def applied(name: str | None) -> Iterator[None]:
    """Run with one fault, or with none."""
    if name is None:
        yield
        return
    attribute, replacement = FAULTS[name]
    with mock.patch.object(BodyEngine, attribute, replacement):
        yield


_forward, _backward = BodyEngine.forward, BodyEngine.backward


def _without_world_size(self, micro_batch, hidden_gradient, is_last):
    self._world_size = 1
    return _backward(self, micro_batch, hidden_gradient, is_last)


def _input_gradient_not_divided(self, micro_batch, hidden_gradient, is_last):
    return _backward(self, micro_batch, hidden_gradient, is_last) * self._world_size


def _drops_first_micro_batch(self, micro_batch, hidden_gradient, is_last):
    if micro_batch == 0:
        hidden_gradient = torch.zeros_like(hidden_gradient)
    return _backward(self, micro_batch, hidden_gradient, is_last)


def _forward_keeps_graph(self, micro_batch, body_input):
    self._stage = 2
    return _forward(self, micro_batch, body_input)


FAULTS = {
    "gradient scale off by the world size": ("backward", _without_world_size),
    "input gradient scale off by the world size": ("backward", _input_gradient_not_divided),
    "a micro-batch dropped": ("backward", _drops_first_micro_batch),
    "ZeRO 3 without its re-run": ("forward", _forward_keeps_graph),
}
