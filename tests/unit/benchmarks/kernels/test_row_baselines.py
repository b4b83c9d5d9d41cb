"""Further baselines of LayerNorm and the loss are right where they are installed."""

from dataclasses import replace

import pytest
import torch

from benchmarks.kernels.row_baselines import layer_norm_baselines, loss_baselines
from fedbert_ds.bench.kernels.problem import BOTH, FORWARD, measure
from fedbert_ds.bench.kernels.rows import layer_norm_problem, loss_problem

CPU = torch.device("cpu")


def outcomes(problem, more):
    rows = measure(replace(problem, ways=more), CPU, peak=1e9, rounds=1, seconds=0.0)
    return {(row["way"], row["pass"]): row.get("reason") for row in rows}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_layer_norm(dropout: float) -> None:
    problem = layer_norm_problem(16, 48, torch.float32, dropout, CPU, compiled=False)
    found = outcomes(problem, layer_norm_baselines(problem))
    assert found["Liger, dropout in torch", FORWARD] in (None, "not installed")


def test_the_clients_loss_has_torchs_own_operator_beside_it() -> None:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has none")
    problem = loss_problem(10, 16, 70, torch.float32, CPU, compiled=False)
    found = outcomes(problem, loss_baselines(problem))
    assert found["torch linear_cross_entropy", BOTH] is None
