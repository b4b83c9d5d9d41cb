"""LayerNorm and the client's loss by Liger, and the loss by torch's own operator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernels.available import installed
from fedbert_ds.bench.kernels.problem import Build, Prepared, Problem, plain
from fedbert_ds.bench.kernels.rows import EPSILON


def layer_norm_baselines(problem: Problem) -> dict[str, Build]:
    """Further ways to compute the problem."""
    leaves, dy = problem.inputs["leaves"], problem.inputs["dy"]

    def liger(p: float) -> Prepared:
        norm = installed("liger_kernel.ops.layer_norm", "LigerLayerNormFunction")

        def compute(x: Tensor, residual: Tensor, bias: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
            y: Tensor = norm.apply(residual + functional.dropout(x + bias, p), weight, shift, EPSILON)
            return y

        return plain(compute, leaves, dy)

    return {"Liger, dropout in torch": liger}


def loss_baselines(problem: Problem) -> dict[str, Build]:
    """Further ways to compute the problem."""
    leaves, targets = problem.inputs["leaves"], problem.inputs["targets"]
    one = torch.ones((), device=targets.device)

    def torchs_own(_: float) -> Prepared:
        function = installed("torch.nn.functional", "linear_cross_entropy")
        return plain(
            lambda hidden, weight, bias: function(hidden, weight, targets, linear_bias=bias, reduction="sum"),
            leaves,
            one,
        )

    def liger(_: float) -> Prepared:
        function = installed("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
        return plain(
            lambda hidden, weight, bias: function(hidden, weight, targets, bias=bias, reduction="sum"), leaves, one
        )

    return {"torch linear_cross_entropy": torchs_own, "Liger": liger}
