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
from fedbert_ds.wire.codecs import to_frame
from fedbert_kernels.encoded import NAMES, Encoded

CPU = torch.device("cpu")
LOAD = Load("forward", 100)


def test_a_cpu_is_done_at_once() -> None:
    work = Device(CPU).start(lambda: torch.ones(2, 3, dtype=torch.bfloat16), LOAD, "int8")
    assert work.is_done
    encoded, seconds = work.result()
    assert encoded.codec == "int8" and torch.equal(encoded.decode(), torch.ones(2, 3)) and seconds >= 0.0


def test_upload_to_a_cpu_is_the_tensor_itself() -> None:
    tensor = torch.ones(3)
    assert Device(CPU).upload([tensor]) is tensor
    assert Device(CPU).upload([tensor, torch.zeros(1)]).tolist() == [1.0, 1.0, 1.0, 0.0]


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
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: log.append("pin") or self)
    copy, empty = torch.Tensor.copy_, torch.empty

    def noted_copy(self: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        log.append(f"copy {tuple(source.shape)} on {streams.stream_now.name}{'' if non_blocking else ', waiting'}")
        return copy(self, source)

    def noted_empty(shape: Any, *, dtype: torch.dtype, device: Any = None, pin_memory: bool = False) -> torch.Tensor:
        log.append("pinned memory" if pin_memory else "device memory" if device is not None else "memory")
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(torch.Tensor, "copy_", noted_copy)
    monkeypatch.setattr(torch, "empty", noted_empty)
    device = Device(SimpleNamespace(type="cuda"))  # type: ignore[arg-type]

    there = device.upload([torch.full((2, 3), 3.0), torch.full((1, 3), 4.0)])
    assert torch.equal(there, torch.tensor([[3.0] * 3, [3.0] * 3, [4.0] * 3]))
    copies = ["pin", "copy (2, 3) on up", "pin", "copy (1, 3) on up"]
    assert log == ["device memory", *copies, "compute waits for up", "kept for compute"]
    log.clear()

    def compute() -> torch.Tensor:
        log.append(f"compute on {streams.stream_now.name}")
        return there

    encoded = Encoded.of(there, "int8")
    monkeypatch.setattr(
        Encoded, "of", lambda values, codec: log.append(f"{codec} on {streams.stream_now.name}") or encoded
    )
    work = device.start(compute, LOAD, "int8")
    assert not work.is_done
    assert log == [
        "record event 0 on compute",
        "compute on compute",
        "int8 on compute",
        "record event 1 on compute",
        "down waits for event 1",
        *("pinned memory", "copy (3, 3) on down", "kept for down"),
        *("pinned memory", "copy (3, 1) on down", "kept for down"),
        "record event 2 on down",
    ]
    result, seconds = work.result()
    assert log[-1] == "wait for event 2" and seconds == 0.25 and work.is_done
    assert torch.equal(result.payload, encoded.payload) and torch.equal(result.decode(), there)
    assert work.result()[1] == 0.25, "asked again, nothing changes"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("codec", NAMES)
def test_on_a_gpu(codec: str) -> None:
    device = Device(torch.device("cuda"))
    values = torch.randn(1000, 1000)
    coded = Encoded.of(values, codec)
    works = [
        device.start(lambda n=n: Encoded.join(coded.split([300, 700]), device.upload).decode() * n, LOAD, codec)
        for n in range(20)
    ]
    for n, work in enumerate(works):
        result, seconds = work.result()
        here = Encoded.of(coded.decode() * n, codec)
        assert to_frame(result) == to_frame(here), "the CPU makes the same bytes"
        assert seconds > 0.0
