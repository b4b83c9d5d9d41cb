"""A timeline read back: what `telemetry.trace` wrote adds up to what was done."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbert_ds.telemetry.timeline import read_trace, shares
from fedbert_ds.telemetry.trace import Trace


class Clock:
    """Stands for `time` in the trace: it stands still until it is set."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def trace_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three windows of one second each."""
    clock = Clock()
    monkeypatch.setattr("fedbert_ds.telemetry.trace.time", clock)
    path = tmp_path / "trace-0.json"
    trace = Trace(path)
    for window in range(3):
        begin = float(window)
        trace.add("forward", begin, begin + 0.1, micro_batch=2 * window)
        trace.add("wait", begin + 0.1, begin + 0.4)
        trace.add("backward", begin + 0.4, begin + 0.6, micro_batch=2 * window)
        trace.add("step", begin + 0.7, begin + 0.8, window=window)
        trace.add("gather", begin + 0.81, begin + 0.86, window=window)
        for name, track, asked, answered in (
            ("gradient", "ada", begin + 0.1, begin + 0.1 + 0.05 * (3 - window)),
            ("activations", "bo", begin + 0.2, begin + 0.5),
        ):
            clock.now = asked
            trace.begin(name, track, micro_batch=window)
            clock.now = answered
            trace.end(name, track, micro_batch=window)
    trace.close()
    return path


def test_shares_of_a_stretch_of_windows(trace_file: Path) -> None:
    found = shares(read_trace(trace_file), 1, 2)
    assert found.seconds == pytest.approx(2.0, abs=1e-5)
    assert found.forward == pytest.approx(0.2, abs=1e-5)
    assert found.backward == pytest.approx(0.4, abs=1e-5)
    assert found.step == pytest.approx(0.2, abs=1e-5)
    assert found.wait == pytest.approx(0.6, abs=1e-5)
    assert found.gather == pytest.approx(0.1, abs=1e-5)
    assert found.compute == pytest.approx(0.8, abs=1e-5)
    assert found.messages == pytest.approx(0.5, abs=1e-5)
    assert found.micro_batches == 2
    assert found.activations == pytest.approx(0.3, abs=1e-5)
    assert found.gradient == pytest.approx(0.05, abs=1e-5)


def test_a_timeline_that_was_cut_short_is_read_to_its_last_whole_line(trace_file: Path) -> None:
    text = trace_file.read_text()
    trace_file.write_text(text[: text.rindex('"gather"')])
    assert shares(read_trace(trace_file), 1, 2).seconds == pytest.approx(2.0, abs=1e-5)
