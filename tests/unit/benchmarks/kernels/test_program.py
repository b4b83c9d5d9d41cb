"""`python -m benchmarks.kernels` is bench kernels with further baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels import __main__ as program
from fedbert_ds.bench.kernels.rows import gelu_problem, layer_norm_problem, loss_problem

CPU = torch.device("cpu")


def test_options_reach_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(program, "bench_kernels", lambda options, more: given.extend([options, more]))
    arguments = ["--out", "o.json", "--kernel", "GELU"]
    monkeypatch.setattr("sys.argv", ["benchmarks/kernels/__main__.py", *arguments])
    program.main(arguments)
    options, more = given
    assert options.out == Path("o.json") and options.kernels == ("GELU",)
    assert options.command == f"python -m benchmarks.kernels {' '.join(arguments)}"
    assert more is program.further_baselines


def test_every_kernel_has_its_own_baselines() -> None:
    norm = layer_norm_problem(4, 8, torch.float32, 0.0, CPU, compiled=False)
    loss = loss_problem(4, 8, 20, torch.float32, CPU, compiled=False)
    gelu = gelu_problem(4, 8, torch.float32, CPU, compiled=False)
    found = [set(program.further_baselines(problem, False)) for problem in (norm, loss, gelu)]
    assert found == [{"Liger, dropout in torch"}, {"torch linear_cross_entropy", "Liger"}, set()]
