"""Mean and sample spread over seeds, tasks in one order, and an average that MNLI's help is not
in."""

from __future__ import annotations

from pathlib import Path

from fedbert_ds.glue.table import average, draw, measures, table


def result(row: str, seed: int, score: float, dev: dict) -> dict:
    return {"row": row, "task": row.removesuffix("-from-MNLI"), "seed": seed, "score": score, "dev": dev}


RESULTS = [
    result("RTE", 1, 0.7, {"dev": {"accuracy": 0.7}}),
    result("RTE", 0, 0.5, {"dev": {"accuracy": 0.5}}),
    result("RTE-from-MNLI", 0, 0.9, {"dev": {"accuracy": 0.9}}),
    result("MNLI", 0, 0.8, {"dev_matched": {"accuracy": 0.79}, "dev_mismatched": {"accuracy": 0.81}}),
    result("CoLA", 0, -0.1, {"dev": {"matthews": -0.1}}),
]


def test_the_table() -> None:
    assert table(RESULTS).splitlines() == [
        "| task | metric | mean | ± | seeds |",
        "| --- | --- | --: | --: | --: |",
        "| MNLI m | accuracy | 79.0 |  | 79.0 |",
        "| MNLI mm | accuracy | 81.0 |  | 81.0 |",
        "| CoLA | Matthews | -10.0 |  | -10.0 |",
        "| RTE | accuracy | 60.0 | 14.1 | 50.0, 70.0 |",
        "| RTE-from-MNLI | accuracy | 90.0 |  | 90.0 |",
        "| average of 3 tasks |  | 43.3 |  |  |",
    ]


def test_the_average_is_over_tasks_not_over_runs() -> None:
    assert average(RESULTS) == (0.8 - 0.1 + 0.6) / 3
    (rte,) = [one for one in measures(RESULTS) if one.row == "RTE"]
    assert rte.seeds == (0, 1) and rte.values == (0.5, 0.7)


def test_the_picture_is_one(tmp_path: Path) -> None:
    draw(tmp_path / "table.png", RESULTS)
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
