"""Runs whose losses are known, as rows, summary and table."""

import pytest

from benchmarks.codecs.counted import Sizes
from benchmarks.codecs.report import rows_of, summarize, table
from benchmarks.codecs.settings import BASELINE, Setting, all_in, key_of


def run_of(setting, seed, loss):
    return {
        "setting": key_of(setting), "seed": seed, "held_out_loss": loss, "training_loss": loss,
        "tokens": 100, "bytes_up": 300, "bytes_down": 200, "seconds": 1.0,
    }  # fmt: skip


def test_cost_is_over_fp32_of_the_same_model_and_seed():
    factorized, coarse = Setting(model="factorized"), all_in("int8", model="factorized")
    runs = [
        run_of(BASELINE, 1, 5.0), run_of(BASELINE, 2, 4.0), run_of(all_in("int8"), 1, 5.05),
        run_of(all_in("int8"), 2, 4.08), run_of(factorized, 1, 6.0), run_of(coarse, 1, 6.06),
        run_of(all_in("bf16"), 3, 5.0),
    ]  # fmt: skip
    rows = rows_of(runs)
    assert [row["cost"] and round(row["cost"], 6) for row in rows] == [0, 0, 0.01, 0.02, 0.2, 0.01, None]
    assert (rows[0]["bytes_per_token_up"], rows[0]["bytes_per_token_down"]) == (3.0, 2.0)
    size = Sizes(10.0, 20.0, 33.0)
    summary = summarize(rows, {setting: size for setting in (BASELINE, all_in("int8"), all_in("bf16"))})
    assert len(summary) == 2, "bf16 has nothing to be held against"
    assert summary[1]["seeds"] == 2 and summary[1]["bytes_per_token"] == 30.0
    assert summary[1]["bytes_per_token_not_compressed"] == 33.0
    assert summary[1]["cost"] == pytest.approx(0.015)
    assert "| +1.50 % | +1.00 to +2.00 | 2 |" in table(summary)
