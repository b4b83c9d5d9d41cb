"""What a rank's timeline says of where its time went: a reader of the files that `telemetry.trace` writes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbert_ds.telemetry.trace import BODY

COMPUTE = ("forward", "backward", "step")


@dataclass(frozen=True)
class Shares:
    """Seconds of a stretch of windows on one rank."""

    seconds: float
    compute: float
    """Forwards, backwards and steps of real micro-batches; dummies are told apart by their caller."""
    wait: float
    answer: float
    """The quickest answers of clients added up, activations and gradients: a client's work and one round trip each."""


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
    inside = [e for e in events if e["ph"] == "X" and begin <= e["ts"] < end]
    answers: dict[str, list[float]] = {}
    asked: dict[str, float] = {}
    for event in events:
        if event["ph"] == "b" and event.get("cat") != BODY:
            asked[event["id"]] = event["ts"]
        elif event["ph"] == "e" and event["id"] in asked and begin <= event["ts"] < end:
            answers.setdefault(event["name"], []).append(event["ts"] - asked.pop(event["id"]))
    return Shares(
        seconds=(end - begin) / 1e6,
        compute=sum(e["dur"] for e in inside if e["name"] in COMPUTE) / 1e6,
        wait=sum(e["dur"] for e in inside if e["name"].startswith("wait")) / 1e6,
        answer=sum(min(values) for values in answers.values()) / 1e6,
    )
