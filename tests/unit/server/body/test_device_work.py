"""Work of a device: done at once on a CPU; on a GPU in an order that a stand-in for torch.cuda
writes down.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedbert_ds.server.body.device_work import DeviceWork, upload

CPU = torch.device("cpu")


def test_a_cpu_is_done_at_once() -> None:
    work = DeviceWork.start(CPU, lambda: torch.ones(2, 3, dtype=torch.bfloat16))
    assert work.is_done
    tensor, seconds = work.result()
    assert tensor.dtype is torch.float32 and torch.equal(tensor, torch.ones(2, 3)) and seconds >= 0.0


def test_upload_to_a_cpu_is_the_tensor_itself() -> None:
    tensor = torch.ones(3)
    assert upload(tensor, CPU) is tensor


class FakeCuda:
    """Events and streams that only keep a log; an event is done once somebody has waited for it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.stream_now = "compute"
        self.stream = self._stream

    def Event(self, enable_timing: bool = False) -> Any:
        number = sum(entry.startswith("record") for entry in self.log)
        event = SimpleNamespace(done=False, name=f"event {number}")
        event.record = lambda: self.log.append(f"record on {self.stream_now}")
        event.query = lambda: event.done

        def synchronize() -> None:
            event.done = True
            self.log.append("wait for the copy")

        event.synchronize = synchronize
        event.elapsed_time = lambda other: 250.0
        return event

    @contextmanager
    def _stream(self, stream: Any):
        before, self.stream_now = self.stream_now, stream.name
        yield
        self.stream_now = before


def test_a_gpu_copies_beside_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr("fedbert_ds.server.body.device_work.torch.cuda", cuda)
    copies = SimpleNamespace(name="copies", wait_event=lambda event: cuda.log.append("copies wait for the computation"))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: cuda.log.append("memory is kept"))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: empty(shape, dtype=dtype))
    device = SimpleNamespace(type="cuda")

    def compute() -> torch.Tensor:
        cuda.log.append(f"compute on {cuda.stream_now}")
        return torch.full((2,), 3.0)

    work = DeviceWork.start(device, compute, copies)  # type: ignore[arg-type]
    assert not work.is_done
    assert cuda.log == [
        "record on compute",
        "compute on compute",
        "record on compute",
        "copies wait for the computation",
        "memory is kept",
        "record on copies",
    ]
    tensor, seconds = work.result()
    assert cuda.log[-1] == "wait for the copy" and seconds == 0.25 and work.is_done
    assert torch.equal(tensor, torch.full((2,), 3.0))
    assert work.result()[1] == 0.25, "asked again, nothing changes"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    device = torch.device("cuda")
    copies = torch.cuda.Stream(device)
    values = torch.randn(1000, 1000)
    works = [DeviceWork.start(device, lambda n=n: upload(values, device, copies) * n, copies) for n in range(20)]
    for n, work in enumerate(works):
        tensor, seconds = work.result()
        torch.testing.assert_close(tensor, values * n)
        assert seconds > 0.0
