"""`python -m benchmarks.modes` hands on what was typed, and the command itself for the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.modes import __main__ as program
from benchmarks.modes.systems import STALE_SYSTEMS


def test_options_reach_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(program, "bench_modes", given.append)
    arguments = ["--data", "f.tokens", "--out", "o.json", "--windows", "7", "--staleness", "run.seed=2"]
    monkeypatch.setattr("sys.argv", ["benchmarks/modes/__main__.py", *arguments])
    program.main(arguments)
    (options,) = given
    assert options.data == "f.tokens" and options.out == Path("o.json") and options.systems == STALE_SYSTEMS
    assert options.overrides == ("run.windows=7", "run.seed=2")
    assert options.command == f"python -m benchmarks.modes {' '.join(arguments)}"
