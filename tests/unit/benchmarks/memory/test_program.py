"""`python -m benchmarks.memory` hands on what was typed, tells phases apart, prints its rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory import __main__ as program
from benchmarks.memory.benchmark import table
from benchmarks.memory.client import Phases
from benchmarks.memory.runs import BASE, CASES, RUN_FILE
from fedbert_ds.run_file import load_config


def test_options_reach_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(program, "bench_memory", given.append)
    arguments = ["--out", "o.json", "--quick", "--only", BASE, "--set", "run.seed=2"]
    monkeypatch.setattr("sys.argv", ["benchmarks/memory/__main__.py", *arguments])
    program.main(arguments)
    (options,) = given
    assert options.out == Path("o.json") and options.quick and options.only == (BASE,)
    assert options.overrides == ("run.seed=2",)
    assert options.command.startswith("python -m benchmarks.memory --out o.json --quick")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.slug)
def test_every_case_is_a_run_file(case: Any) -> None:
    config = load_config(RUN_FILE, case.overrides)
    assert (config.federation.mode, config.wire.updates) == (case.mode, case.updates)
    assert config.tokenizer.vocab_size == 30_522 and config.data.sequence_length == 128


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_phase_counts_what_is_held_in_it() -> None:
    phases = Phases()
    with phases.phase("outer"):
        with phases.phase("inner"):
            held = bytearray(64 << 20)
            held[::4096] = bytes(len(held[::4096])).replace(b"\0", b"x")
            del held
        with phases.phase("after"):
            pass
    assert phases.peaks["inner"] > phases.peaks["outer"] + (48 << 20)
    assert phases.peaks["inner"] > phases.peaks["after"] + (48 << 20)


def test_the_table_has_a_row_for_each_client() -> None:
    row = {"model": "m", "mode": "parallel", "updates": "int8", "begins": "fresh", "peak_mb": 12.4}
    rows = [row | {"phases": {"imports": 3.0, "head": 12.4}}, row | {"begins": "resumed", "phases": {"imports": 12.4}}]
    assert table(rows).splitlines()[2:] == [
        "| m | parallel | int8 | fresh | 12 | 3 | **12** |",
        "| m | parallel | int8 | resumed | 12 | **12** |  |",
    ]
