"""Work of the body's device: uploads, computation and downloads beside one another.

On a GPU all three are queued, each on a stream of its own, and the host goes on. On a CPU they are
done at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedbert_ds.server.body.pace import Load, Pace
from fedbert_kernels.encoded import Encoded

HOLD_UP_CYCLES = 100_000_000
"""Of a GPU, some 60 ms: longer than the host takes to launch a forward or a backward."""


class DeviceWork:
    """A tensor that the device computes and encodes, and the seconds that it took.

    On a GPU `events` mark the computation's beginning and end and the end of the copy;
    `computed(seconds)` says what of the time between the first two was computation.
    """

    def __init__(
        self,
        encoded: Encoded,
        seconds: float = 0.0,
        events: tuple[Any, Any, Any] | None = None,
        computed: Callable[[float], float] = lambda seconds: seconds,
    ) -> None:
        self._encoded = encoded
        self._seconds = seconds
        self._events = events
        self._computed = computed

    @property
    def is_done(self) -> bool:
        """Whether the result is here."""
        return self._events is None or self._events[2].query()

    def result(self) -> tuple[Encoded, float]:
        """(encoded tensor on the CPU, seconds of device computation). Waits for both."""
        if self._events is not None:
            began, ended, copied = self._events
            copied.synchronize()
            self._seconds, self._events = self._computed(began.elapsed_time(ended) / 1e3), None
        return self._encoded, self._seconds


class Device:
    """Queues the work of one device. What is uploaded or computed here stays there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pace = Pace()
        if device.type != "cpu":
            self._module = torch.get_device_module(device)
            # A copy down waits for the computation. The next one up must not wait behind it.
            self._up, self._down = self._module.Stream(device), self._module.Stream(device)

    def upload(self, parts: Sequence[Tensor]) -> Tensor:
        """The parts on the device, joined; the computation that is queued next waits for them.

        Parts in pinned memory are copied from where they are.
        """
        first = parts[0]
        if first.device.type == self.device.type:
            return first if len(parts) == 1 else torch.cat(list(parts))
        lengths = [len(part) for part in parts]
        with self._module.stream(self._up):
            there = torch.empty((sum(lengths), *first.shape[1:]), dtype=first.dtype, device=self.device)
            for part, place in zip(parts, there.split(lengths), strict=True):
                place.copy_(part.pin_memory(), non_blocking=True)
        current = self._module.current_stream(self.device)
        current.wait_stream(self._up)
        there.record_stream(current)
        return there

    def start(self, compute: Callable[[], Tensor], load: Load, codec: str) -> DeviceWork:
        """Start `compute`, the coding of its result and the copy of the codes to the CPU."""
        if self.device.type == "cpu":
            started = time.monotonic()
            encoded = Encoded.of(compute(), codec)
            return DeviceWork(encoded, time.monotonic() - started)
        began, ended = (self._module.Event(enable_timing=True) for _ in range(2))
        if self._pace.wants_sample(load):
            # The host then launches all of it before the device begins.
            self._module._sleep(HOLD_UP_CYCLES)
        began.record()
        result = Encoded.of(compute(), codec)
        ended.record()
        may_have_gaps = began.query()
        self._down.wait_event(ended)
        with self._module.stream(self._down):
            encoded = result.map(self._download)
            copied = self._module.Event()
            copied.record()
        computed = partial(self._pace.computed, load, may_have_gaps=may_have_gaps)
        return DeviceWork(encoded, events=(began, ended, copied), computed=computed)

    def _download(self, there: Tensor) -> Tensor:
        """The tensor in pinned memory, once the current stream has copied it."""
        tensor = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
        tensor.copy_(there, non_blocking=True)
        # No other tensor may get its memory while the copy still reads it.
        there.record_stream(self._down)
        return tensor
