"""Predictions beside a record: costs come from the runs without a link, and a wrong prediction
shows as an error.
"""

from __future__ import annotations

import copy

import pytest

from fedbert_ds.config import FederationSection, WireSection
from fedbert_ds.errors import RunError
from fedbert_ds.federation.strategy import strategy_of
from fedbert_ds.planner.scenario import BodyCosts, ClientCosts, Scenario, Wire
from fedbert_ds.planner.simulation import simulate
from fedbert_ds.planner.validate import table, validate

SETTINGS = {
    "window": {"tokens_per_micro_batch": 1024},
    "data": {"sequence_length": 128},
    "federation": {"average_every": 1000},
}


def record() -> dict:
    """What a machine would measure on which the planner's model is exactly right."""
    rows = []
    for rtt_ms, mbit in ((0.0, None), (50.0, 100.0), (200.0, 100.0)):
        rate = mbit * 1e6 / 8 if mbit else float("inf")
        scenario = Scenario(
            body=BodyCosts(1e-4, 2e-4, 2e-3, 0.02, 0.001),
            clients=(ClientCosts(1e-5, 3e-5, rtt=rtt_ms / 1e3, up=rate, down=rate),) * 8,
            wire=Wire(60.0, 60.0, 60.0, 60.0),
            strategy=strategy_of(FederationSection(mode="parallel", average_every=1000), WireSection()),
            tokens_per_window=16384,
            tokens_per_micro_batch=1024,
            client_cores=1,
        )
        outcome = simulate(scenario)
        rows.append(
            {
                "system": "ours", "variant": "", "cut": "rows", "codec": "int8/int8",
                "rtt_ms": rtt_ms, "mbit": mbit, "clients": 8, "mode": "parallel",
                "staleness": 0, "tokens_per_second": outcome.tokens_per_second, "utilization": outcome.busy_share,
                "bytes_per_token_up": 120.0, "bytes_per_token_down": 120.0, "bytes_per_token_averaging": 0.0,
                "window_tokens": 16384, "micro_batches": 16,
                "seconds": {
                    "forward": 1e-4, "backward": 2e-4, "messages": 2e-3, "step": 0.02, "gather": 0.001, "wait": 0.0,
                    "activations": 1e-5 * 1024, "gradient": 3e-5 * 1024,
                },
            }
        )  # fmt: skip
    return {
        "rows": [*rows, {"system": "naive", "cut": "rows", "codec": "int8/int8", "rtt_ms": 50.0}],
        "settings": SETTINGS,
    }


def test_what_was_measured_is_predicted() -> None:
    checks = list(validate(record()))
    assert [check.row["rtt_ms"] for check in checks] == [50.0, 200.0]
    assert all(abs(check.error) < 0.01 for check in checks)
    assert "+0.0 %" in table(checks) or "-0.0 %" in table(checks)


def test_a_slower_machine_than_predicted_shows() -> None:
    spoiled = copy.deepcopy(record())
    spoiled["rows"][1]["tokens_per_second"] *= 0.5
    assert next(iter(validate(spoiled))).error == pytest.approx(1.0, abs=0.05)


def test_a_record_without_a_run_to_learn_from_is_refused() -> None:
    spoiled = copy.deepcopy(record())
    del spoiled["rows"][0]
    with pytest.raises(RunError, match="no run without a link"):
        list(validate(spoiled))
