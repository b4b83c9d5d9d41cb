"""FedProx (Li et al. 2020): a term that draws a client's weights to those all clients had in
common.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter


@torch.no_grad()
def add_proximal_gradient(parameters: Mapping[str, Parameter], reference: Mapping[str, Tensor], mu: float) -> None:
    """Add the gradient of mu / 2 * ||w - w_ref||^2 to the gradients of the parameters in
    `reference`.

    `reference` holds w_ref by name, of the parameters' shapes, on any device. A parameter without
    a gradient gets one. With mu 0 nothing changes.
    """
    if mu == 0:
        return
    for name, common in reference.items():
        parameter = parameters[name]
        pull = mu * (parameter - common.to(parameter.device))
        parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)
