"""`python -m benchmarks.fp8` hands on what was typed, and its table compares seed by seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.codecs.runs import Text
from benchmarks.codecs.settings import RUN_FILE
from benchmarks.fp8 import __main__ as program
from benchmarks.fp8 import benchmark
from benchmarks.fp8.benchmark import PRODUCTS, QUICK, TRAINED, table, train
from fedbert_ds.run_file import load_config


def test_options_reach_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(program, "bench_fp8", given.append)
    arguments = ["--out", "o.json", "--quick", "--seeds", "5", "--set", "run.windows=2"]
    monkeypatch.setattr("sys.argv", ["benchmarks/fp8/__main__.py", *arguments])
    program.main(arguments)
    (options,) = given
    assert options.out == Path("o.json") and options.quick and options.seeds == 5
    assert options.overrides == ("run.windows=2",)
    assert options.command.startswith("python -m benchmarks.fp8 --out o.json --quick")


def test_losses_are_compared_with_bf16_s_of_the_same_seed() -> None:
    losses = {"fp32": (3.0, 4.0), "bf16": (3.1, 4.2), "fp8": (3.15, 4.1)}
    rows = [
        {"products": kind, "seed": seed, "held_out_loss": loss}
        for kind, of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds, 1)
    ]
    assert table(rows).splitlines()[2:] == [
        "| fp32 | 3.5000 | -0.1000, -0.2000 |",
        "| bf16 | 3.6500 |  |",
        "| fp8 | 3.6250 | +0.0500, -0.1000 |",
    ]


def test_products_are_those_named_and_nothing_else_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torchao is not installed, fp8 is what a stand-in makes of it: nothing."""
    installed: list[Any] = []
    monkeypatch.setattr(benchmark, "install_fp8", lambda body, device: installed.append(body))
    config = load_config(RUN_FILE, (*TRAINED, *QUICK, "model.num_hidden_layers=2"))
    text = Text(config, quick=True)
    losses = {kind: train(kind, 1, config, text) for kind in PRODUCTS}
    assert len(installed) == 1
    assert losses["fp8"] == losses["bf16"] != losses["fp32"]
    assert abs(losses["bf16"] - losses["fp32"]) < 0.01
