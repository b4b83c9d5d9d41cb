"""Deliberate faults in the server. The equality tests must notice each."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from fedbert_ds.server import evaluations
from fedbert_ds.server.body.device_work import DeviceWork
from fedbert_ds.server.body.engine import BodyEngine
from fedbert_ds.server.body.window_gradient import WindowGradient
from fedbert_ds.server.queue import priority
from fedbert_ds.server.queue.schedule import State
from fedbert_ds.server.run_reporter import RunReporter
from fedbert_ds.telemetry.evaluations import HeldOutLoss, evaluation_of
from fedbert_kernels.encoded import Encoded


@contextmanager
def applied(name: str | None) -> Iterator[None]:
    """Run with one fault or variation, or with none."""
    with ExitStack() as patches:
        for target, attribute, replacement in (FAULTS | VARIATIONS | INTERRUPTIONS)[name] if name else ():
            patches.enter_context(mock.patch.object(target, attribute, replacement))
        yield


_backward, _give = BodyEngine.backward, WindowGradient.give
_window = RunReporter.window


def _gives_the_mean(self):
    for flat in self._flats:
        flat.div_(torch.distributed.get_world_size())
    _give(self)


def _input_gradient_not_divided(self, micro_batch, hidden_gradient, codec):
    gradient, seconds = _backward(self, micro_batch, hidden_gradient).result()
    return DeviceWork(Encoded.of(gradient.decode() * self._world_size, codec), seconds)


def _drops_first_micro_batch(self, micro_batch, hidden_gradient, codec):
    if micro_batch == 0:
        hidden_gradient = [part.map(torch.zeros_like) for part in hidden_gradient]
    return _backward(self, micro_batch, hidden_gradient, codec)


def _newest_backward_first(window, is_fixed):
    newest = max(window.in_flight, key=lambda micro_batch: micro_batch.index, default=None)
    return newest if newest is not None and newest.state is State.GRADIENTS_READY else None


def _stops_before_window_3(self, window, statuses):
    # Like SLURM's warning: on one rank only, while window 2 runs.
    if window == 1 and torch.distributed.get_rank() == 0:
        signal.raise_signal(signal.SIGUSR1)
    return _window(self, window, statuses)


def _worse_each_time(window, losses, asked, measures_of):
    worse = {name: HeldOutLoss(loss.loss_sum * 2**window, loss.masked_tokens) for name, loss in losses.items()}
    return evaluation_of(window, worse, asked, measures_of)


Patches = list[tuple[object, str, object]]

VARIATIONS: dict[str, Patches] = {"newest backward first": [(priority, "next_backward", _newest_backward_first)]}
"""Other ways than the server's own. The result must stay the same."""

INTERRUPTIONS: dict[str, Patches] = {
    "stopped before window 3": [(RunReporter, "window", _stops_before_window_3)],
    "evaluations grow worse": [(evaluations, "evaluation_of", _worse_each_time)],
}

FAULTS: dict[str, Patches] = {
    "gradient scale off by the world size": [(WindowGradient, "give", _gives_the_mean)],
    "input gradient scale off by the world size": [(BodyEngine, "backward", _input_gradient_not_divided)],
    "a micro-batch dropped": [(BodyEngine, "backward", _drops_first_micro_batch)],
}
