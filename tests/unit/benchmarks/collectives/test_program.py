"""Rows and table of what two ranks have counted."""

from __future__ import annotations

from benchmarks.collectives.benchmark import rows_of, table

COUNTS = {
    "1-lamb-4": {
        "before": [],
        "step": [["_reduce_scatter_base_", 600], ["allreduce_", 4], ["_allgather_base_", 300]],
        "operations": [30, 20],
        "bytes": 400,
    },
    "3-adamw-2": {"before": [["allreduce_", 40]] * 6, "step": [], "operations": [7], "bytes": 80},
}


def test_rows_count_what_the_ranks_have_noted() -> None:
    first, second = rows_of(COUNTS)
    assert first == {
        "stage": 1,
        "optimizer": "lamb",
        "layers": 4,
        "collectives_before_step": 0,
        "collectives_of_step": 3,
        "bytes": 904,
        "gradient_bytes": 400,
        "optimizer_calls": 2,
        "operations_in_calls": 50,
    }
    assert (second["collectives_before_step"], second["bytes"]) == (6, 240)
    assert "| 1 | lamb | 4 | 0 | 3 | 2.3 | 2 | 50 |" in table([first, second]).splitlines()
