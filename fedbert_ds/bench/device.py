"""The device under a benchmark: its rates, and times of several candidates side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedbert_ds.server.body.peak import matmul

Call = Callable[[], Any]
CALLS_AHEAD = 64
"""Most calls launched ahead: a device's queue holds some thousand kernels, a call up to ten."""
CYCLES_AHEAD = 100_000_000
"""Of the device, some 60 ms: time for the host to launch the calls, a millisecond each."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over the rounds."""

    median: float
    fastest: float
    slowest: float


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> dict[str, Any]:
    """What a record says of the device."""
    if device.type != "cuda":
        return {"device": device.type, "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
    }


def time_side_by_side(
    candidates: Mapping[str, Call],
    device: torch.device,
    rounds: int = 7,
    seconds: float = 0.1,
    launch_ahead: bool = False,
    clock: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Time the candidates in turn, `rounds` times over: a slow machine then slows all of them.

    Each is called once to warm up. One measurement is as many calls as take about `seconds`, at
    least one, and every round begins with another candidate. With `launch_ahead`, a GPU waits until
    the host has launched the calls (at most `CALLS_AHEAD`): the time of small kernels is then the
    device's, as it is in a model that keeps it busy.
    """
    names = list(candidates)
    ahead = launch_ahead and device.type == "cuda"
    calls = {name: _calls(candidates[name], device, seconds) for name in names}
    if ahead:
        calls = {name: min(count, CALLS_AHEAD) for name, count in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_time(candidates[name], device, calls[name], ahead, clock))
    return {name: Timing(statistics.median(values), min(values), max(values)) for name, values in times.items()}


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Dense matrix products in FLOP/s, the median of several."""
    call, flops = matmul(device, dtype, size)
    return flops / time_side_by_side({"matmul": call}, device)["matmul"].median


def memory_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes/s, read and written, of a copy larger than any cache; the median of several."""
    size = size or ((2 << 30) if device.type == "cuda" else (256 << 20))
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    timing = time_side_by_side({"copy": lambda: target.copy_(source)}, device)["copy"]
    return 2.0 * size / timing.median


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Peak bytes of tensors that a call adds to those already there; None except on CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _calls(call: Call, device: torch.device, seconds: float) -> int:
    """Calls that take about `seconds`; the first call, which compiles or tunes, does not count."""
    _time(call, device, 1)
    return max(1, round(seconds / max(1e-9, _time(call, device, 1))))


def _time(
    call: Call,
    device: torch.device,
    calls: int,
    ahead: bool = False,
    clock: Callable[[], float] | None = None,
) -> float:
    """Seconds of one of `calls` calls in a row."""
    if device.type != "cuda":
        clock = clock or time.perf_counter
        started = clock()
        for _ in range(calls):
            call()
        return (clock() - started) / calls
    # Events, so that the time ends with the device's work and not with a host's waiting for it.
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(CYCLES_AHEAD)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls
