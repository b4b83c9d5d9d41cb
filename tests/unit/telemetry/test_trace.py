"""A timeline: valid JSON in Chrome's format, also when it was cut short; nothing without a path."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from fedbert_ds.telemetry.trace import BODY, Trace


def test_without_a_path_nothing_happens(tmp_path: Path) -> None:
    trace = Trace(None)
    with trace.span("forward", micro_batch=1):
        pass
    trace.begin("activations", "ada")
    trace.end("activations", "ada")
    trace.close()
    assert not list(tmp_path.iterdir())


def test_spans_and_round_trips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace-2.json"
    trace = Trace(path, rank=2)
    now = [time.monotonic()]
    monkeypatch.setattr("fedbert_ds.telemetry.trace.time.monotonic", lambda: now[0])
    with trace.span("forward", micro_batch=7):
        pass
    for what, micro_batch in ((trace.begin, 7), (trace.begin, 8), (trace.end, 7), (trace.end, 8)):
        now[0] += 1.0
        what("gradient", "ada", micro_batch=micro_batch)
    trace.close()
    trace.add("late", 0.0, 1.0)  # after the end: nothing
    events = [event for event in json.loads(path.read_text(encoding="utf-8")) if event]
    assert {event["pid"] for event in events} == {2}
    names = {event["args"]["name"]: event.get("tid") for event in events if event["ph"] == "M"}
    assert names.keys() == {"rank 2", BODY, "ada"}
    (span,) = (event for event in events if event["ph"] == "X")
    assert span["name"] == "forward" and span["tid"] == names[BODY] and span["args"] == {"micro_batch": 7}
    assert 0.0 <= span["dur"] < 1e6
    begins = [event for event in events if event["ph"] == "b"]
    ends = {event["id"]: event["ts"] for event in events if event["ph"] == "e"}
    assert len(begins) == len(ends) == 2, "overlapping round trips have names of their own"
    for event in begins:
        assert event["tid"] == names["ada"]
        assert abs(ends[event["id"]] - event["ts"] - 2e6) < 1.0


def test_a_timeline_that_was_cut_short_can_be_mended(tmp_path: Path) -> None:
    """Viewers do the same: the closing bracket may be missing."""
    path = tmp_path / "trace-0.json"
    trace = Trace(path)
    for number in range(2000):
        trace.add("forward", 0.0, 1.0, micro_batch=number)
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rindex("\n")].rstrip(",")
    assert len(json.loads(whole + "]")) > 100
    trace.close()
