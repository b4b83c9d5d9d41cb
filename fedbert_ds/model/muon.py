"""Muon: matrices step along their orthogonalized momentum; all other parameters by AdamW.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the learning rate of
a matrix as in Liu et al. 2025, "Muon is Scalable for LLM Training", so that one rate and one decay
serve both rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Jordan's quintic iteration: steep at 0, so that five steps lift small singular values to about
1, between 0.68 and 1.13, where they stay.
"""
STEPS = 5
RMS_OF_ADAMW = 0.2
"""Root mean square that Adam's steps have in units of the learning rate, by Liu et al. 2025."""


def orthogonalize(matrix: Tensor, steps: int = STEPS) -> Tensor:
    """About U V^T for a matrix U S V^T, [R, C] of any float dtype, by Newton-Schulz iteration.

    Singular values above a hundredth of the Frobenius norm become 0.68 to 1.13; smaller ones grow
    by up to 3.44 a step. Singular vectors stay. In the matrix's dtype: torch.optim.Muon iterates in
    bf16, which processors without bf16 units compute slowly. A matrix of zeros stays zero.
    """
    a, b, c = COEFFICIENTS
    # The smaller side of the two makes the smaller products.
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=torch.finfo(x.dtype).tiny)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def step_length(shape: torch.Size) -> float:
    """Factor of the learning rate that gives an orthogonalized matrix of this shape the root mean
    square of Adam's steps.

    An orthogonal [R, C] has a root mean square of 1 / sqrt(max(R, C)).
    """
    return RMS_OF_ADAMW * max(shape) ** 0.5


class Muon(torch.optim.AdamW):
    """Muon for parameter groups that say `muon: True`, each parameter a matrix; AdamW for others.

    A matrix with gradient G keeps momentum M = mu M + (1 - mu) G and moves by -lr (step_length
    orthogonalize(mu M + (1 - mu) G) + weight_decay W): Nesterov's form, decay decoupled. A step
    takes the matrices' gradients.
    """

    def __init__(self, params: Any, momentum: float = 0.95, **adamw: Any) -> None:
        super().__init__(params, **adamw)
        for group in self.param_groups:
            group.setdefault("muon", False)
            group["momentum"] = momentum
            wrong = [tuple(p.shape) for p in group["params"] if group["muon"] and p.dim() != 2]
            if wrong:
                raise ValueError(f"Muon steps matrices, not tensors of shape {wrong[0]}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_matrix(group, parameter, parameter.grad)
                        parameter.grad = None
        super().step()  # passes over parameters without a gradient
        return loss

    def _step_matrix(self, group: dict[str, Any], matrix: Tensor, gradient: Tensor) -> None:
        state = self.state[matrix]
        if not state:
            # AdamW looks for `step` in whatever it loads.
            state["step"], state["momentum"] = torch.tensor(0.0), torch.zeros_like(matrix)
        state["step"] += 1
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        direction = orthogonalize(gradient.lerp(state["momentum"], group["momentum"]))
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(direction, alpha=-group["lr"] * step_length(matrix.shape))


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon steps a parameter, by its Hugging Face name: the matrices of encoder layers.

    Embeddings, head, biases and LayerNorm weights are AdamW's (Jordan et al. 2024; Thérien et al.
    2025, "MuLoCo").
    """
    return parameter.dim() == 2 and ".encoder.layer." in name
