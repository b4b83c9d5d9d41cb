"""Work of a device: at once on a CPU; on a GPU queued, in an order that a stand-in writes down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedbert_ds.server.body.device_work import Device
from fedbert_ds.server.body.pace import Load

CPU = torch.device("cpu")
LOAD = Load("forward", 100)


def test_a_cpu_is_done_at_once() -> None:
    work = Device(CPU).start(lambda: torch.ones(2, 3, dtype=torch.bfloat16), LOAD)
    assert work.is_done
    tensor, seconds = work.result()
    assert tensor.dtype is torch.float32 and torch.equal(tensor, torch.ones(2, 3)) and seconds >= 0.0


def test_upload_to_a_cpu_is_the_tensor_itself() -> None:
    tensor = torch.ones(3)
    assert Device(CPU).upload(tensor) is tensor


class Streams:
    """A device's module whose events and streams only keep a log; an event is done once somebody
    has waited for it.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.names = iter(["up", "down"])
        self.stream_now = SimpleNamespace(name="compute", wait_stream=self._compute_waits)

    def Stream(self, device: Any) -> Any:
        name = next(self.names)
        return SimpleNamespace(name=name, wait_event=lambda event: self.log.append(f"{name} waits for {event.name}"))

    def Event(self, enable_timing: bool = False) -> Any:
        event = SimpleNamespace(done=False, name="nothing")

        def record() -> None:
            event.name = f"event {sum(entry.startswith('record') for entry in self.log)}"
            self.log.append(f"record {event.name} on {self.stream_now.name}")

        def synchronize() -> None:
            event.done = True
            self.log.append(f"wait for {event.name}")

        event.record, event.synchronize = record, synchronize
        event.query = lambda: event.done
        event.elapsed_time = lambda other: 250.0
        return event

    def current_stream(self, device: Any) -> Any:
        return self.stream_now

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.stream_now = self.stream_now, stream
        yield
        self.stream_now = before

    def _compute_waits(self, stream: Any) -> None:
        self.log.append(f"compute waits for {stream.name}")


def test_a_gpu_copies_up_and_down_beside_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams()
    log = streams.log
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: log.append(f"kept for {stream.name}"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **keywords: log.append(f"to {keywords}") or self)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: empty(shape, dtype=dtype))
    device = Device(SimpleNamespace(type="cuda"))  # type: ignore[arg-type]

    there = device.upload(torch.full((2,), 3.0))
    assert log == ["to {'non_blocking': True}", "compute waits for up", "kept for compute"]
    log.clear()

    def compute() -> torch.Tensor:
        log.append(f"compute on {streams.stream_now.name}")
        return there

    work = device.start(compute, LOAD)
    assert not work.is_done
    assert log == [
        "record event 0 on compute",
        "compute on compute",
        "to {}",
        "record event 1 on compute",
        "down waits for event 1",
        "kept for down",
        "record event 2 on down",
    ]
    tensor, seconds = work.result()
    assert log[-1] == "wait for event 2" and seconds == 0.25 and work.is_done
    assert torch.equal(tensor, torch.full((2,), 3.0))
    assert work.result()[1] == 0.25, "asked again, nothing changes"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    device = Device(torch.device("cuda"))
    values = torch.randn(1000, 1000)
    works = [device.start(lambda n=n: device.upload(values) * n, LOAD) for n in range(20)]
    for n, work in enumerate(works):
        tensor, seconds = work.result()
        torch.testing.assert_close(tensor, values * n)
        assert seconds > 0.0
