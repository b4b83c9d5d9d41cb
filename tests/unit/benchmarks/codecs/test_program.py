"""`python -m benchmarks.codecs` hands on what was typed, and the command itself for the record."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.codecs import __main__ as program


def test_options_reach_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(program, "bench_codecs", given.append)
    arguments = [
        "--out",
        "o.json",
        "--seeds",
        "2",
        "--minutes",
        "5",
        "--vocabulary",
        "v",
        "run.seed=2",
        "--codecs",
        "int8",
        "bf16",
    ]
    monkeypatch.setattr("sys.argv", ["benchmarks/codecs/__main__.py", *arguments])
    program.main(arguments)
    (options,) = given
    assert (options.seeds, options.minutes, options.vocabulary) == (2, 5.0, "v")
    assert options.codecs == ("int8", "bf16")
    assert options.overrides == ("run.seed=2",)
    assert options.command == f"python -m benchmarks.codecs {' '.join(arguments)}"
