"""`fedbert-ds plan`: a plan with its record, predictions beside a record, and options that do not
fit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from unit.planner.test_validate import record

from fedbert_ds.errors import ConfigError
from fedbert_ds.planner.command import machines_of, run_plan
from fedbert_ds.planner.scenario import Spread

CONFIG = Path(__file__).parents[3] / "configs" / "bert-base.yaml"


def options(**changes: Any) -> argparse.Namespace:
    """What the command line gives by default."""
    defaults: dict[str, Any] = {
        "config": CONFIG, "overrides": ["window.tokens=65536"], "tokens": 1e9, "gpus": 1, "tflops": 989.0,
        "efficiency": 0.4, "price": 2.5, "clients": 4, "client_gflops": 100.0, "rtt": 50.0, "mbit": 100.0,
        "gpu_memory": 80.0, "host_ms": 3.0, "cores": 4.0, "spread": 0.0, "sweep": False, "validate": None, "out": None,
    }  # fmt: skip
    return argparse.Namespace(**(defaults | changes))


def test_a_plan_is_printed_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_plan(options(out=tmp_path / "plan.json"))
    printed = capsys.readouterr().out
    (row,) = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert row["clients"] == 4 and f"{row['tokens_per_second']:,.0f} tokens/s" in printed
    assert printed.endswith(f"record  {tmp_path / 'plan.json'}\n")


def test_a_record_is_predicted(tmp_path: Path) -> None:
    (tmp_path / "measured.json").write_text(json.dumps(record()))
    run_plan(options(config=None, validate=tmp_path / "measured.json", out=tmp_path / "checks.json"))
    rows = json.loads((tmp_path / "checks.json").read_text())["rows"]
    assert [row["rtt_ms"] for row in rows] == [50.0, 200.0]
    assert all(abs(row["error"]) < 0.01 for row in rows)


def test_machines_are_those_of_the_options() -> None:
    machines = machines_of(options(gpus=8, gpu_memory=141.0, mbit=80.0, rtt=20.0, spread=0.5, client_gflops=7.0))
    assert (machines.gpus, machines.gpu_memory) == (8, 141e9)
    assert (machines.up, machines.down, machines.rtt) == (1e7, 1e7, 0.02)
    assert machines.client_flops == 7e9 and machines.spread == Spread(0.5, 0.5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config": None}, "plan needs --config FILE"),
        ({"sweep": True}, "--sweep needs --out"),
        ({"gpus": 0}, "--gpus 0: give a number above 0"),
        ({"gpu_memory": 0.0}, "--gpu-memory 0.0: give a number above 0"),
        ({"client_gflops": -1.0}, "--client-gflops -1.0: give a number above 0"),
        ({"rtt": -1.0}, "--rtt, --spread and --host-ms cannot be below 0"),
        ({"validate": Path("nowhere.json")}, "--validate nowhere.json: not a record of bench pipeline"),
    ],
)
def test_options_that_do_not_fit_are_one_line(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_plan(options(**changes))
    assert reason in str(caught.value) and "\n" not in str(caught.value)
