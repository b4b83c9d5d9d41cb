"""`python -m benchmarks.evaluation` hands on what was typed; every way gives the same loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evaluation import __main__ as program
from benchmarks.evaluation.benchmark import EvaluationOptions, bench_evaluation, table


def test_options_reach_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(program, "bench_evaluation", given.append)
    program.main(["--out", "o.json", "--quick", "--sequences", "7", "--rounds", "2", "--batch-size", "3"])
    (options,) = given
    assert (options.out, options.quick, options.sequences) == (Path("o.json"), True, 7)
    assert (options.rounds, options.batch_size) == (2, 3)


def test_a_quick_run_compares_the_losses_and_writes_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench_evaluation(EvaluationOptions(tmp_path / "record.json", "it", quick=True, batch_size=3))
    rows = {row["way"]: row for row in json.loads((tmp_path / "record.json").read_text())["rows"]}
    assert list(rows) == ["in order", "by count", "by tokens", "packed"]
    assert rows["packed"]["padding"] == 0.0 <= rows["by count"]["padding"] <= rows["in order"]["padding"]
    assert "| by count |" in capsys.readouterr().out


def test_times_are_told_beside_what_was_before() -> None:
    rows = [
        {"way": "by count", "median": 4.0, "padding": 0.03},
        {"way": "by tokens", "median": 3.0, "padding": 0.042},
    ]
    assert table(rows).splitlines()[2:] == ["| by count | 3.0 % | 1.00 |", "| by tokens | 4.2 % | 0.75 |"]
