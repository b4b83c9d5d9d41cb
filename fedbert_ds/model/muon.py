"""Muon: matrices step along their orthogonalized momentum; all other parameters by AdamW.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the learning rate of
a matrix as in Liu et al. 2025, "Muon is Scalable for LLM Training", so that one rate and one decay
serve both rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedbert_ds.model.architecture import ARCHITECTURES
from fedbert_ds.model.partition import Partition, WholeMatrices

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Jordan's quintic iteration: steep at 0, so that five steps lift small singular values to about
1, between 0.68 and 1.21, where they stay.
"""
STEPS = 5
RMS_OF_ADAMW = 0.2
"""Root mean square that Adam's steps have in units of the learning rate, by Liu et al. 2025."""
MOST_ELEMENTS = 1 << 25
"""Of matrices that are orthogonalized together."""


def orthogonalize(matrices: Tensor, steps: int = STEPS) -> Tensor:
    """About U V^T for each matrix U S V^T, [n, R, C] of any float dtype, by Newton and Schulz.

    Singular values above a hundredth of the Frobenius norm become 0.68 to 1.21; smaller ones grow
    by up to 3.44 a step. Singular vectors stay. In the matrices' dtype. A matrix of zeros stays
    zero.
    """
    a, b, c = COEFFICIENTS
    # The smaller side of the two makes the smaller products.
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def orthogonalized(matrices: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonalize` for matrices [R, C] of any shapes, equal ones together: calls do not grow
    with the number of layers.

    On a GPU in bf16, as Jordan et al. do; processors without bf16 units compute in it slowly.
    """
    by_shape: dict[torch.Size, list[int]] = {}
    for number, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(number)
    results = list(matrices)
    for shape, numbers in by_shape.items():
        together = max(1, MOST_ELEMENTS // shape.numel())
        for some in (numbers[n : n + together] for n in range(0, len(numbers), together)):
            stacked = torch.stack([matrices[number] for number in some])
            found = orthogonalize(stacked.bfloat16() if stacked.is_cuda else stacked).to(stacked.dtype)
            for number, matrix in zip(some, found, strict=True):
                results[number] = matrix
    return results


def step_length(shape: torch.Size) -> float:
    """Factor of the learning rate that gives an orthogonalized matrix of this shape the root mean
    square of Adam's steps.

    An orthogonal [R, C] has a root mean square of 1 / sqrt(max(R, C)).
    """
    return RMS_OF_ADAMW * max(shape) ** 0.5


class Muon(torch.optim.AdamW):
    """Muon for parameter groups that say `muon: True`, each parameter a matrix; AdamW for others.

    A matrix with gradient G keeps momentum M = mu M + (1 - mu) G and moves by -lr (step_length
    orthogonalize(mu M + (1 - mu) G) + weight_decay W): Nesterov's form, decay decoupled.

    Under DeepSpeed's ZeRO the matrices lie in flat tensors, of which each rank has a part:
    `partitions` then says where. Momentum is kept as it lies, and in each step every rank
    orthogonalizes some of the matrices, whole, for all. Every rank must step the same groups in the
    same order.
    """

    def __init__(self, params: Any, momentum: float = 0.95, **adamw: Any) -> None:
        super().__init__(params, **adamw)
        for group in self.param_groups:
            group.setdefault("muon", False)
            group["momentum"] = momentum
            wrong = [tuple(p.shape) for p in group["params"] if group["muon"] and p.dim() != 2]
            if wrong:
                raise ValueError(f"Muon steps matrices, not tensors of shape {wrong[0]}")
        self.partitions: dict[Tensor, Partition] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepped: list[tuple[Tensor, Tensor | None]] = []
        for group in self.param_groups:
            matrices = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["muon"] and matrices:
                self._step_matrices(group, matrices)
                stepped += [(matrix, matrix.grad) for matrix in matrices]
        for matrix, _ in stepped:
            matrix.grad = None
        super().step()  # passes over parameters without a gradient
        for matrix, gradient in stepped:
            matrix.grad = gradient
        return loss

    def _step_matrices(self, group: dict[str, Any], matrices: list[Tensor]) -> None:
        for matrix in matrices:
            if not self.state[matrix]:
                # AdamW looks for `step` in whatever it loads.
                self.state[matrix] |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(matrix)}
        torch._foreach_add_([self.state[matrix]["step"] for matrix in matrices], 1)
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        momenta = [self.state[matrix]["momentum"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = list(torch._foreach_lerp(gradients, momenta, group["momentum"]))
        whole = [number for number, matrix in enumerate(matrices) if matrix not in self.partitions]
        for number, found in zip(whole, _updates([directions[number] for number in whole]), strict=True):
            directions[number] = found
        for matrix, direction in zip(matrices, directions, strict=True):
            if matrix in self.partitions:
                dealt = WholeMatrices(self.partitions[matrix])
                mine = dealt.gather(direction)
                dealt.scatter(dict(zip(mine, _updates(list(mine.values())), strict=True)), direction)
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, directions, alpha=-group["lr"])


def _updates(directions: Sequence[Tensor]) -> list[Tensor]:
    """Of whole matrices, in units of the learning rate."""
    found = orthogonalized(directions)
    if found:
        torch._foreach_mul_(found, [step_length(matrix.shape) for matrix in found])
    return found


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon steps a parameter, by its Hugging Face name: the matrices of encoder layers.

    Embeddings, head, biases and LayerNorm weights are AdamW's (Jordan et al. 2024; Thérien et al.
    2025, "MuLoCo").
    """
    return parameter.dim() == 2 and any(f".{parts.layers}." in name for parts in ARCHITECTURES.values())
