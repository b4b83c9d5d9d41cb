"""Every `fedbert-ds bench NAME` hands on what was typed, and the command itself for the record."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from fedbert_ds.cli import main

CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "pipeline": (
        ["--rtt", "5", "9", "--mbit", "10", "--links", "proxy", "--only", "ours", "--set", "a.b=1"],
        {"rtt_ms": (5.0, 9.0), "mbit": 10.0, "links": "proxy", "only": ("ours",), "overrides": ("a.b=1",)},
    ),
    "network": (
        ["--quick", "--what", "streams", "--streams", "9", "--minutes", "2"],
        {"quick": True, "what": ("streams",), "streams": 9, "minutes": 2.0},
    ),
    "body": (["--dropout", "0.2", "--kernels", "torch"], {"dropout": 0.2, "kernels": "torch", "rounds": 7}),
    "host": (["--rounds", "3"], {"rounds": 3, "quick": False}),
    "memory": (["--quick"], {"quick": True}),
    "kernels": (["--kernel", "attention", "--tune"], {"kernels": ("attention",), "tune": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_options_reach_the_benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, expected = CASES[name]
    arguments = ["bench", name, "--out", "x.json", *arguments]
    given: list[Any] = []
    module = importlib.import_module(f"fedbert_ds.bench.{name}.benchmark")
    monkeypatch.setattr(module, f"bench_{name}", given.append)
    monkeypatch.setattr("sys.argv", ["fedbert-ds", *arguments])
    main(arguments)
    (options,) = given
    assert options.out == Path("x.json")
    assert options.command == f"fedbert-ds {' '.join(arguments)}"
    assert {field: getattr(options, field) for field in expected} == expected
