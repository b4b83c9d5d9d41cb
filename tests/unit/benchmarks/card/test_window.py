"""A window through the engine on a CPU, in a process of its own; the union of spans."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.card.window import covered

ROOT = Path(__file__).parents[4]


def test_spans_that_overlap_count_once() -> None:
    assert covered([]) == 0.0
    assert covered([(0.0, 2.0), (1.0, 3.0), (1.5, 1.6), (5.0, 6.0)]) == 4.0


@pytest.mark.timeout(300)
def test_the_steps_of_a_card_run_on_a_cpu(tmp_path: Path) -> None:
    """Two of them; `make card` runs all."""
    out = tmp_path / "card.json"
    command = [sys.executable, "-m", "benchmarks.card", "--out", str(out), "--only", "facts", "waits", "--minutes", "4"]
    hidden = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    record = json.loads(out.read_text())
    assert result.returncode == 0 and [step["ended"] for step in record["steps"]] == ["done"] * 2, record["steps"]
    facts, *windows = record["rows"]
    assert facts["step"] == "facts" and facts["product_flops_per_second"] > 0
    assert [row["zero_stage"] for row in windows] == [1, 0, 2]
    for row in windows:
        assert 0.0 < row["told_to_compute"] < 1.0 and row["waits"] == {} and row["tokens_per_second"] > 0
