"""A window of micro-batches through the engine: who waits, and how long the card computes."""

from __future__ import annotations

import collections
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedbert_ds.bench.body.encoders import MASK_SHARE, Shape
from fedbert_ds.config import RunConfig
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import split
from fedbert_ds.run_file import parse_config
from fedbert_ds.server.body.device_work import DeviceWork
from fedbert_ds.server.body.engine import BodyEngine
from fedbert_ds.server.body.packed_input import BodyInput
from fedbert_kernels.encoded import Encoded

SETTINGS = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"
WARM_UP = 3
IN_FLIGHT = 4
CODEC = "int8"


@dataclass(frozen=True)
class EngineCase:
    """A body under DeepSpeed, and its micro-batches."""

    shape: Shape
    stage: int
    tokens: int
    """Of a micro-batch."""
    length: int
    """Of each sequence."""
    num_micro_batches: int


def measured(case: EngineCase, device: torch.device) -> dict[str, Any]:
    """A row. On a CPU nothing waits, and no profiler is asked what the device computed."""
    window = _Window(case, device)
    for _ in range(WARM_UP):
        window.run()
    waits = _waits(window.run) if device.type == "cuda" else {}
    _synchronize(device)
    started = time.perf_counter()
    computed, host = window.run()
    _synchronize(device)
    seconds = time.perf_counter() - started
    tokens = case.tokens * case.num_micro_batches
    return {
        "model": case.shape.name,
        "zero_stage": case.stage,
        "tokens": case.tokens,
        "waits": waits,
        "ms_micro_batch": 1e3 * seconds / case.num_micro_batches,
        "host_ms_micro_batch": 1e3 * host / case.num_micro_batches,
        "tokens_per_second": tokens / seconds,
        "told_to_compute": computed / seconds,
        "computes_by_profiler": _kernel_share(window.run) if device.type == "cuda" else None,
        "affordable_in_flight": window.engine.affordable_in_flight(),
    }


class _Window:
    """The same window, as often as it is run."""

    def __init__(self, case: EngineCase, device: torch.device) -> None:
        config = _config(case, "fp32" if device.type == "cpu" else "bf16")
        _, body = split(build_model(config.model, 100, 0, 1), "embeddings")
        kernels = "torch" if device.type == "cpu" else config.kernels
        self.engine = BodyEngine.build(body.to(device), config.body, config.optimizer, kernels, device)
        self._case = case
        self._masked = torch.arange(0, case.tokens, round(1 / MASK_SHARE))
        self._bounds = torch.arange(0, case.tokens + 1, case.length, dtype=torch.int32)
        self._activations, self._gradient = (
            # As the decoding threads leave them.
            Encoded.of(values, CODEC).map(lambda part: part.pin_memory() if device.type == "cuda" else part)
            for values in (
                torch.randn(case.tokens, case.shape.hidden_size),
                1e-6 * torch.randn(len(self._masked), case.shape.hidden_size),
            )
        )

    def run(self) -> tuple[float, float]:
        """Seconds that the device computed as the engine tells, and that the host launched."""
        under_way: collections.deque[DeviceWork] = collections.deque()
        computed = host = 0.0
        count = self._case.num_micro_batches
        for number in range(count + IN_FLIGHT):
            started = time.perf_counter()
            if number < count:
                inputs = BodyInput([self._activations], self._masked, self._bounds, None, number)
                under_way.append(self.engine.forward(number, inputs, CODEC))
            if number >= IN_FLIGHT:
                under_way.append(self.engine.backward(number - IN_FLIGHT, [self._gradient], CODEC))
            host += time.perf_counter() - started
            while under_way and under_way[0].is_done:
                computed += under_way.popleft().result()[1]
        while under_way:
            computed += under_way.popleft().result()[1]
        self.engine.step(1e-5)
        return computed, host


def _config(case: EngineCase, precision: str) -> RunConfig:
    shape = case.shape
    model = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.longest,
        "dropout": 0.1,
    }
    body = {"deepspeed": str(SETTINGS / f"zero{case.stage}.json"), "precision": precision}
    return parse_config({"model": model, "body": body, "optimizer": {"name": "adamw"}}, "card")


def _waits(run: Callable[[], Any]) -> dict[str, int]:
    """Calls that wait for the card, by their place, as torch warns of them."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return dict(collections.Counter(f"{Path(each.filename).name}:{each.lineno}" for each in caught))


def _kernel_share(run: Callable[[], Any]) -> float:
    """Share of the time in which some kernel runs, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
    )
    return covered(kernels) / 1e6 / seconds


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans, which are in order of their beginnings."""
    total, end = 0.0, float("-inf")
    for first, last in spans:
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
