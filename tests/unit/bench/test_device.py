"""Side-by-side timing takes turns, and rates are what the clock and the sizes say."""

import contextlib

import pytest
import torch

from fedbert_ds.bench import device as module
from fedbert_ds.bench.device import (
    Timing,
    matmul_rate,
    memory_bandwidth,
    peak_memory,
    time_side_by_side,
)

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Time passes only when a test says so."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def candidate(clock, calls, name, *durations):
    """Takes the first duration in its first call, and so on; the last from then on."""
    left = list(durations)

    def call():
        calls.append(name)
        clock.now += left.pop(0) if len(left) > 1 else left[0]

    return call


def test_candidates_take_turns_and_each_round_begins_with_another(clock):
    calls: list[str] = []
    candidates = {name: candidate(clock, calls, name, 1.0) for name in "abc"}
    time_side_by_side(candidates, CPU, rounds=4, seconds=0.5)
    # One call to warm up and one to see how long it takes.
    assert calls[:6] == list("aabbcc")
    assert "".join(calls[6:]) == "abcbcacababc"


def test_another_clock_tells_the_time(clock):
    readings = iter(range(1000))
    timing = time_side_by_side({"a": candidate(clock, [], "a", 0.5)}, CPU, 3, 0.5, clock=lambda: 7.0 * next(readings))
    assert timing["a"] == Timing(7.0, 7.0, 7.0)


def test_times_are_of_one_call_and_the_first_does_not_count(clock):
    timings = time_side_by_side(
        {"steady": candidate(clock, [], "", 100.0, 0.25), "varied": candidate(clock, [], "", 9.0, 2.0, 5.0, 1.0, 3.0)},
        CPU,
        rounds=3,
        seconds=1.0,
    )
    assert timings == {"steady": Timing(0.25, 0.25, 0.25), "varied": Timing(3.0, 1.0, 5.0)}


def test_short_calls_are_repeated_until_a_measurement_is_long_enough(clock):
    calls: list[str] = []
    time_side_by_side({"a": candidate(clock, calls, "a", 0.25)}, CPU, rounds=3, seconds=1.0)
    assert len(calls) == 2 + 3 * 4


def test_rates_follow_from_size_and_time(monkeypatch):
    def two_seconds(candidates, device):
        for call in candidates.values():
            call()
        return {name: Timing(2.0, 1.0, 3.0) for name in candidates}

    monkeypatch.setattr(module, "time_side_by_side", two_seconds)
    assert matmul_rate(CPU, torch.float32, size=10) == 2 * 10**3 / 2.0
    assert memory_bandwidth(CPU, size=400) == 2 * 400 / 2.0


def test_a_cpu_has_no_peak_memory():
    assert peak_memory(lambda: None, CPU) is None


def test_a_gpu_waits_while_the_host_launches_ahead(monkeypatch):
    events: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            events.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: events.append("sleep"))
    for launch_ahead, most in ((True, module.CALLS_AHEAD), (False, 1000)):
        events.clear()
        call = {"a": lambda: events.append("call")}
        time_side_by_side(call, torch.device("cuda", 0), rounds=1, seconds=1.0, launch_ahead=launch_ahead)
        warm_up = ["event", "call", "event"] * 2
        assert events == [*warm_up, *["sleep"] * launch_ahead, "event", *["call"] * most, "event"]
