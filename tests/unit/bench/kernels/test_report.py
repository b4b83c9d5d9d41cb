"""Rows of bench kernels as a table."""

import json
from pathlib import Path

from fedbert_ds.bench.kernels.problem import BOTH, FORWARD, OURS
from fedbert_ds.bench.kernels.report import draw, table

RECORDS = Path(__file__).parents[4] / "benchmarks" / "results"


def row(way: str, what: str, milliseconds: float | None, **more) -> dict:
    figures = {"reason": "needs a GPU"} if milliseconds is None else {
        "milliseconds": milliseconds, "GB/s": 100 / milliseconds, "share_of_peak": 0.5,
    }  # fmt: skip
    return {"kernel": "GELU", "case": "width 8", "dropout": 0.0, "way": way, "pass": what} | figures | more


def test_the_table_says_how_many_times_faster_ours_is() -> None:
    rows = [row(OURS, FORWARD, 1.0), row("a", FORWARD, 3.0), row(OURS, BOTH, 2.0), row("a", BOTH, 5.0)]
    lines = table(rows).splitlines()
    assert "| GELU | width 8 | ours | 1 | 2 | 50 GB/s | 50% |  |" in lines
    assert "| GELU | width 8 | a | 3 | 5 | 20 GB/s | 50% | 2.50x |" in lines


def test_who_lacks_a_backward_is_compared_forward_and_who_lacks_all_is_named_below() -> None:
    rows = [
        row(OURS, FORWARD, 1.0), row("a", FORWARD, 3.0), row("b", FORWARD, None),
        row(OURS, BOTH, 2.0), row("a", BOTH, None), row("b", BOTH, None),
    ]  # fmt: skip
    lines = table(rows).splitlines()
    assert "| GELU | width 8 | a | 3 |  | 33.3 GB/s | 50% | 3.00x |" in lines
    assert lines[-1].startswith("Not measured, needs a GPU: ") and "b" in lines[-1]
    assert "a (GELU, width 8, forward + backward)" in lines[-1]


def test_small_rates_are_in_gflops() -> None:
    rows = [row(OURS, FORWARD, 1.0) | {"TFLOP/s": 0.0123}]
    assert "12.3 GFLOP/s" in table(rows)


def test_an_older_record_is_read(tmp_path: Path) -> None:
    rows = json.loads((RECORDS / "kernels-cpu.json").read_text())["rows"]
    assert "| layer norm | width 256 | ours | " in table(rows)
    draw(tmp_path / "kernels.png", rows)
    assert (tmp_path / "kernels.png").stat().st_size > 1000
