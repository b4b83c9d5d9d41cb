"""`python -m benchmarks.naive` is bench pipeline with the naive system among its systems."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.naive import __main__ as program
from benchmarks.naive.system import CONNECTION_KEPT, NAIVE
from fedbert_ds.bench.pipeline.settings import settings


def test_options_reach_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(program, "bench_pipeline", lambda *arguments: given.extend(arguments))
    arguments = ["--out", "x.json", "--rtt", "50", "--links", "proxy", "--only", "naive"]
    monkeypatch.setattr("sys.argv", ["benchmarks/naive/__main__.py", *arguments])
    program.main(arguments)
    options, baselines = given
    assert options.out == Path("x.json") and options.rtt_ms == (50.0,) and baselines == [NAIVE]
    assert options.command == f"python -m benchmarks.naive {' '.join(arguments)}"
    assert [(s.system, s.variant) for s in settings(options, baselines)] == [("naive", ""), ("naive", CONNECTION_KEPT)]
