"""Faults put into the server on purpose, to see that the equality tests notice them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from fedbert_ds.server.body.device_work import DeviceWork
from fedbert_ds.server.body.engine import BodyEngine
from fedbert_ds.server.queue.pipeline_queue import PipelineQueue, _State
from fedbert_ds.server.rank import RankServer


@contextmanager
def applied(name: str | None) -> Iterator[None]:
    """Run with one fault or variation, or with none."""
    with ExitStack() as patches:
        for target, attribute, replacement in (FAULTS | VARIATIONS | INTERRUPTIONS)[name] if name else ():
            patches.enter_context(mock.patch.object(target, attribute, replacement))
        yield


_forward, _backward, _first = BodyEngine.forward, BodyEngine.backward, PipelineQueue._first
_gather = RankServer._gather


def _without_world_size(self, micro_batch, hidden_gradient, is_last):
    self._world_size = 1
    return _backward(self, micro_batch, hidden_gradient, is_last)


def _input_gradient_not_divided(self, micro_batch, hidden_gradient, is_last):
    gradient, seconds = _backward(self, micro_batch, hidden_gradient, is_last).result()
    return DeviceWork(gradient * self._world_size, seconds)


def _drops_first_micro_batch(self, micro_batch, hidden_gradient, is_last):
    if micro_batch == 0:
        hidden_gradient = torch.zeros_like(hidden_gradient)
    return _backward(self, micro_batch, hidden_gradient, is_last)


def _forward_keeps_graph(self, micro_batch, body_input):
    self._stage = 2
    return _forward(self, micro_batch, body_input)


def _newest_backward_first(self, state):
    if state is not _State.GRADIENTS_READY:
        return _first(self, state)
    running = self._windows[0].entries.values()
    in_flight = [entry for entry in running if entry.state in (_State.FORWARDED, _State.GRADIENTS_READY)]
    return in_flight[-1] if in_flight and in_flight[-1].state is _State.GRADIENTS_READY else None


def _stops_before_window_3(self, window):
    # As Ctrl-C would, on one rank only.
    if window == 3 and self._rank_group.rank == 0:
        self._stop.requested = True
    return _gather(self, window)


Patches = list[tuple[type, str, object]]

VARIATIONS: dict[str, Patches] = {"newest backward first": [(PipelineQueue, "_first", _newest_backward_first)]}
"""Other orders than the queue's own, under which the result must stay the same."""

INTERRUPTIONS: dict[str, Patches] = {"stopped before window 3": [(RankServer, "_gather", _stops_before_window_3)]}

FAULTS: dict[str, Patches] = {
    "gradient scale off by the world size": [(BodyEngine, "backward", _without_world_size)],
    "input gradient scale off by the world size": [(BodyEngine, "backward", _input_gradient_not_divided)],
    "a micro-batch dropped": [(BodyEngine, "backward", _drops_first_micro_batch)],
    # DeepSpeed's stage 3 happens to be right with kept graphs as long as backwards follow the order of forwards.
    "ZeRO 3 without its re-run": [
        (BodyEngine, "forward", _forward_keeps_graph),
        (PipelineQueue, "_first", _newest_backward_first),
    ],
}
