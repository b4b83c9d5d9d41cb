"""A row of ours is read from the metrics and the timeline that a run left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedbert_ds.bench.pipeline.ours import SETTLING_WINDOWS, row_of
from fedbert_ds.bench.pipeline.settings import Link, PipelineOptions, Run, Setting
from fedbert_ds.telemetry.metrics import MetricsLog, WindowMetrics

WINDOWS = SETTLING_WINDOWS + 2


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Windows of 2 s: 1.5 s forward and backward, 0.5 s wait; a client's answers take 0.1 and 0.2
    s."""
    options = PipelineOptions(tmp_path / "out.json", "", work=tmp_path)
    made = Run(Setting("ours", Link(50.0, 100.0)), options, shards=tmp_path, tokenizer=tmp_path)
    with MetricsLog(made.folder / "metrics.jsonl") as log:
        for window in range(WINDOWS):
            log.append(
                WindowMetrics(
                    window=window, loss=6.0, tokens=1000, masked_tokens=150, lost_masked_tokens=0, seconds=2.0,
                    busy_seconds=1.5, wait_seconds=0.5, forwards=2, backwards=2, dummy_micro_batches=0, fill=1.0,
                    bytes_up=100_000, bytes_down=200_000, update_bytes_up=3000, update_bytes_down=5000, clients=8,
                    learning_rate=1e-3,
                )
            )  # fmt: skip
    events = []
    for window in range(WINDOWS):
        start = 2e6 * window
        for name, offset, length in (("forward", 0.0, 0.5), ("wait", 0.5, 0.5), ("backward", 1.0, 0.9)):
            events.append({"ph": "X", "name": name, "ts": start + 1e6 * offset, "dur": 1e6 * length, "args": {}})
        events.append({"ph": "X", "name": "step", "ts": start + 1.9e6, "dur": 1e5, "args": {"window": window}})
        for name, length in (("activations", 0.1), ("gradient", 0.2)):
            for phase, moment in (("b", start), ("e", start + 1e6 * length)):
                events.append({"ph": phase, "name": name, "id": f"{name} {window}", "ts": moment})
    lines = ",\n".join(map(json.dumps, events))
    (made.folder / "trace-0.json").write_text(f"[\n{lines},\n{{}}]\n")
    return made


def test_row(run: Run) -> None:
    row = row_of(run)
    assert (row["system"], row["mode"], row["staleness"], row["mbit"]) == ("ours", "parallel", 0, 100.0)
    assert row["tokens_per_second"] == 500.0 and row["utilization"] == 0.75 and row["bubble_share"] == 0.25
    assert (row["bytes_per_token_up"], row["bytes_per_token_down"], row["bytes_per_token_averaging"]) == (100, 200, 8)
    assert row["window_tokens"] == 1000 and row["micro_batches"] == 1
    assert row["utilization_bound"] == pytest.approx(1.5 / (1.5 + 0.1 + 0.2))
    assert row["seconds"]["forward"] == pytest.approx(0.5 / 1000)
    assert row["seconds"]["wait"] == pytest.approx(0.5) and row["seconds"]["step"] == pytest.approx(0.1)
