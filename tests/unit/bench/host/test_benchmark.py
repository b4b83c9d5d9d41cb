"""The host's time: every way takes a real step, and a record says how it compares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedbert_ds.bench.host import benchmark
from fedbert_ds.bench.host.benchmark import APART, PLAIN, RECOMPUTED, SELECTIVE, plain, table

pytestmark = pytest.mark.timeout(300)


def test_a_record_of_every_stage(tmp_path: Path) -> None:
    """In a process of its own: torch.distributed is set up."""
    out = tmp_path / "host.json"
    command = [sys.executable, "-m", "fedbert_ds.cli", "bench", "host", "--quick", "--out", str(out)]
    hidden = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr[-3000:]
    record = json.loads(out.read_text())
    first, second, *others = (f"engine, ZeRO {stage}" for stage in range(4))
    assert [row["way"] for row in record["rows"]] == [PLAIN, SELECTIVE, first, second, RECOMPUTED, *others, APART]
    for row in record["rows"]:
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["beside_plain"] == pytest.approx(row["seconds"] / record["rows"][0]["seconds"])
    assert table(record["rows"]) in result.stdout and record["settings"]["layers"] == 2


@pytest.mark.parametrize("is_selective", [False, True])
def test_plain_layers_get_gradients(monkeypatch: pytest.MonkeyPatch, is_selective: bool) -> None:
    built: list[Any] = []
    build = benchmark.build_model
    monkeypatch.setattr(benchmark, "build_model", lambda *given: built.append(build(*given)) or built[0])
    plain(layers=1, is_selective=is_selective)()
    (layer,) = built[0].bert.encoder.layer
    assert all(parameter.grad is not None and torch.any(parameter.grad != 0) for name, parameter in
               layer.named_parameters() if "key.bias" not in name)  # fmt: skip
