"""Rows of `bench pipeline` as a sentence, a table and a picture."""

from __future__ import annotations

from pathlib import Path

from fedbert_ds.bench.pipeline.report import draw, sentence, table


def test_ratios_are_of_the_same_link(row) -> None:
    rows = [row("centralized", 1000.0), row("ours", 900.0), row("naive", 90.0), row("ours", 800.0, 200.0)]
    lines = table(rows).splitlines()
    assert "times naive" in lines[0]
    assert "| 90 % | 10.0 |" in lines[3]
    assert "| 800 |  |  |" in lines[5], "nothing to compare with over that link"
    assert "220 bytes/token" in sentence(rows[1])


def test_without_baselines_there_is_no_column_for_them(row) -> None:
    lines = table([row("centralized", 1000.0), row("ours", 900.0)]).splitlines()
    assert "times" not in lines[0] and "| 900 | 90 % | 90.0 % |" in lines[3]


def test_what_is_measured_before_and_after_counts_with_its_mean(row) -> None:
    rows = [row("centralized", 900.0), row("ours", 950.0), row("centralized", 1100.0)]
    assert "| 95 % |" in table(rows).splitlines()[3]


def test_picture(row, tmp_path: Path) -> None:
    draw(tmp_path / "p.png", [row("centralized", 1000.0, rtt=0.0), row("ours", 900.0), row("naive", 90.0)])
    assert (tmp_path / "p.png").stat().st_size > 1000
