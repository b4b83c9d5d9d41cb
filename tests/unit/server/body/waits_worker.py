"""A program: the windows of a body under DeepSpeed on a device that notes every wait; prints these.

    python waits_worker.py '[[STAGE, PRECISION, CODEC, MUTATION], ...]'

A mutation puts a wait into the path; none is "".
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import fake_device
import pytest
import torch
from fake_device import DEVICE, DeviceTensor
from torch import Tensor

from fedbert_ds.model import attention
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import Body, split
from fedbert_ds.run_file import parse_config
from fedbert_ds.server.body.device_work import Device
from fedbert_ds.server.body.distributed import initialize, shut_down
from fedbert_ds.server.body.engine import BodyEngine
from fedbert_ds.server.body.packed_input import BodyInput
from fedbert_ds.wire.codecs import encode, from_frame
from fedbert_kernels.encoded import Encoded

WINDOWS, MICRO_BATCHES, WIDTH = 3, 4, 32


def main(cases: list[tuple[int, str, str, str]]) -> None:
    """Print for each case the waits of its last window: DeepSpeed learns in the first."""
    kept = fake_device.install()
    initialize()
    for stage, precision, codec, mutation in cases:
        with pytest.MonkeyPatch.context() as patch:
            mutate(patch, mutation)
            engine = built(stage, precision, mutation)
            # The device is held up in the third, to learn what it takes without gaps.
            for _ in range(WINDOWS + (mutation == "slow host")):
                told = window(engine, codec)
        print(json.dumps(told))
    shut_down()
    del kept


def built(stage: int, precision: str, mutation: str) -> BodyEngine:
    """The engine, on the device."""
    settings: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if mutation == "timers":
        settings["timers"] = {"throughput": {"enabled": True}}
    model = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 2}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "zero.json"
        file.write_text(json.dumps(settings))
        config = parse_config({"body": {"deepspeed": str(file), "precision": precision}, "model": model}, "test")
        _, body = split(build_model(config.model, 100, 0, 1), "rows")
        device = torch.device(fake_device.NAME, 0)
        return BodyEngine.build(body.to(device), config.body, config.optimizer, "torch", device)


def window(engine: BodyEngine, codec: str) -> dict[str, Any]:
    """Train one with all micro-batches in flight: waits, time in which the device was idle, bytes
    that crossed, and numbers of collectives: of all forwards, of each backward, of the step; time
    the device worked, and that it was told to have.
    """
    inputs = [micro_batch(number, codec) for number in range(MICRO_BATCHES)]
    gradients = [[arrived(torch.ones(rows, WIDTH), codec) for rows in (1, 2)] for _ in range(MICRO_BATCHES)]
    DEVICE.synchronize()
    DEVICE.take_waits()
    DEVICE.take_bytes()
    began, worked = DEVICE.now, DEVICE.compute.worked
    works = [engine.forward(number, inputs[number], codec) for number in range(MICRO_BATCHES)]
    forwards, collectives = DEVICE.take_waits(), [len(DEVICE.take_collectives())]
    for number in range(MICRO_BATCHES):
        works.append(engine.backward(number, gradients[number], codec))
        collectives.append(len(DEVICE.take_collectives()))
    backwards = DEVICE.take_waits()
    idle, worked = DEVICE.compute.free_at - began, DEVICE.compute.worked - worked
    crossed = DEVICE.take_bytes()
    told = 0.0
    for work in works:
        encoded, seconds = work.result()
        assert not isinstance(encoded.payload, DeviceTensor) and encoded.is_finite
        idle, told = idle - seconds, told + seconds
    DEVICE.take_waits()
    engine.step(0.01)
    step = DEVICE.take_waits()
    collectives.append(len(DEVICE.take_collectives()))
    return {
        "forwards": forwards,
        "backwards": backwards,
        "step": step,
        "idle": idle,
        "collectives": collectives,
        "crossed": crossed,
        "worked": worked,
        "told": told,
    }


def arrived(values: Tensor, codec: str) -> Encoded:
    """A tensor as the decoding threads hand it on."""
    frame = encode(values, codec, compressed=True)
    return from_frame(frame, values.shape, codec, "it", pinned=True)


def micro_batch(number: int, codec: str) -> BodyInput:
    """Pieces of two clients; sequences of unequal lengths whose equal ones are apart, so that
    attention sorts them.
    """
    generator = torch.Generator().manual_seed(number)
    return BodyInput(
        [arrived(torch.randn(rows, WIDTH, generator=generator), codec) for rows in (12, 8)],
        torch.tensor([1, 5, 9]),
        torch.tensor([0, 10, 14, 24], dtype=torch.int32),
        torch.randint(20, (24,), generator=generator),
        number,
    )


def mutate(patch: pytest.MonkeyPatch, mutation: str) -> None:
    """Put the wait into the path."""
    forward, build = Body.forward, Device.__init__

    def reads(self: Body, *inputs: Any) -> Any:
        hidden = forward(self, *inputs)
        return hidden * (hidden.sum().item() != 0.5)

    def with_one_stream(self: Any, device: torch.device) -> None:
        build(self, device)
        self._down = self._up

    match mutation:
        case "item":
            patch.setattr(Body, "forward", reads)
        case "pageable":
            patch.setattr(Device, "upload", lambda self, parts: torch.cat(list(parts)).to(self.device))
        case "lengths":
            patch.setattr(attention, "torch", PageableTorch())
        case "one stream":
            patch.setattr(Device, "__init__", with_one_stream)
        case "slow host":
            patch.setattr(DEVICE, "launch_time", 3 * fake_device.OPERATION)


class PageableTorch:
    """torch, but `tensor` pins no memory."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def tensor(values: Any, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
