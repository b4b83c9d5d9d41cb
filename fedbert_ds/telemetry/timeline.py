"""Where a rank's time went, read from the timeline that `telemetry.trace` writes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shares:
    """Seconds of consecutive windows on one rank; the rest went into messages and decisions."""

    seconds: float
    forward: float
    backward: float
    step: float
    gather: float
    wait: float
    micro_batches: int
    activations: float
    """The quickest answer of clients to credit: their work and one round trip."""
    gradient: float
    """The quickest answer of clients to hidden states."""

    @property
    def compute(self) -> float:
        """The body's."""
        return self.forward + self.backward + self.step

    @property
    def messages(self) -> float:
        """Receiving, checking, packing, sending, deciding."""
        return max(0.0, self.seconds - self.compute - self.gather - self.wait)


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a timeline, also of one that was cut short."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    events = [json.loads(line.rstrip(",")) for line in lines if line.startswith("{") and line.rstrip(",").endswith("}")]
    return [event for event in events if event]


def shares(events: Iterable[dict[str, Any]], first_window: int, last_window: int) -> Shares:
    """Of the time from the step before `first_window` to the step of `last_window`."""
    events = list(events)
    steps = {e["args"]["window"]: e["ts"] + e["dur"] for e in events if e.get("name") == "step" and e["ph"] == "X"}
    begin, end = steps[first_window - 1], steps[last_window]
    inside = [event for event in events if event["ph"] == "X" and begin <= event["ts"] < end]

    def total(name: str) -> float:
        """Of spans whose names begin so: `wait` is the sum of all waits."""
        return sum(event["dur"] for event in inside if event["name"].startswith(name)) / 1e6

    return Shares(
        seconds=(end - begin) / 1e6,
        forward=total("forward"),
        backward=total("backward"),
        step=total("step"),
        gather=total("gather"),
        wait=total("wait"),
        micro_batches=sum(event["name"] == "forward" for event in inside),
        activations=_quickest(events, "activations", begin, end),
        gradient=_quickest(events, "gradient", begin, end),
    )


def _quickest(events: Iterable[dict[str, Any]], name: str, begin: float, end: float) -> float:
    asked: dict[str, float] = {}
    answers = []
    for event in events:
        if event.get("name") != name:
            continue
        if event["ph"] == "b":
            asked[event["id"]] = event["ts"]
        elif event["ph"] == "e" and event["id"] in asked and begin <= event["ts"] < end:
            answers.append(event["ts"] - asked.pop(event["id"]))
    return min(answers, default=0.0) / 1e6
