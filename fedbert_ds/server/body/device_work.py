"""Work of the body's device, whose result is copied back while the next micro-batch computes.

On a GPU the computation is queued and its result is copied to pinned memory on a stream of its own;
the host goes on. On a CPU all of it is done at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DeviceWork:
    """A tensor that the device computes, and the seconds that it took."""

    def __init__(self, tensor: Tensor, seconds: float = 0.0, events: tuple[Any, Any, Any] | None = None) -> None:
        self._tensor = tensor
        self._seconds = seconds
        self._events = events

    @classmethod
    def start(cls, device: torch.device, compute: Callable[[], Tensor], copies: Any = None) -> DeviceWork:
        """Start `compute` and the copy of its result to the CPU, in fp32.

        `copies` is the stream of that copy; a GPU needs one, a CPU ignores it.
        """
        if device.type != "cuda":
            started = time.monotonic()
            tensor = compute().to(device="cpu", dtype=torch.float32)
            return cls(tensor, time.monotonic() - started)
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        result = compute().to(torch.float32)
        ended.record()
        copies.wait_event(ended)
        with torch.cuda.stream(copies):
            tensor = torch.empty(result.shape, dtype=torch.float32, pin_memory=True)
            tensor.copy_(result, non_blocking=True)
            # No other tensor may get its memory while the copy still reads it.
            result.record_stream(copies)
            copied = torch.cuda.Event()
            copied.record()
        return cls(tensor, events=(began, ended, copied))

    @property
    def is_done(self) -> bool:
        """Whether the result is here."""
        return self._events is None or self._events[2].query()

    def result(self) -> tuple[Tensor, float]:
        """(tensor, fp32 on the CPU; seconds of device computation). Waits for both."""
        if self._events is not None:
            began, ended, copied = self._events
            copied.synchronize()
            self._seconds, self._events = began.elapsed_time(ended) / 1e3, None
        return self._tensor, self._seconds


def upload(tensor: Tensor, device: torch.device, copies: Any = None) -> Tensor:
    """The tensor on the device. On a GPU, stream `copies` copies it and the current one waits."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    with torch.cuda.stream(copies):
        there = tensor.pin_memory().to(device, non_blocking=True)
    current = torch.cuda.current_stream(device)
    current.wait_stream(copies)
    there.record_stream(current)
    return there
