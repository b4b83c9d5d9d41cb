"""Server optimizers: pure rules that move the reference weights by the clients' mean change.

The mean change is used as if it were a negative gradient (Reddi et al., "Adaptive Federated
Optimization", ICLR 2021). The mean is weighted by masked tokens, as FedAvg's; the paper's Algorithm
2 weighs all clients of a round alike. With momentum 0 and a learning rate of 1, `Momentum` and
`Nesterov` are FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedbert_ds.config import FederationSection
from fedbert_ds.federation.half_optimizer import OptimizerState

Moments = Mapping[str, Tensor]
"""What a rule remembers of one tensor, each of the tensor's shape, fp32."""


class Rule(Protocol):
    """How one tensor of the reference moves in a round. Arguments are left alone."""

    def begin(self, tensor: Tensor) -> Moments:
        """The moments of a tensor of this shape before its first round."""

    def move(self, change: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        """(what to add to the reference, the new moments) for the clients' mean change."""


@dataclass(frozen=True)
class Momentum:
    """FedAvgM (Hsu et al. 2019): m = momentum * m + change; the step is lr * m.

    The paper has lr 1; a rate as here is Reddi et al.'s.
    """

    lr: float
    momentum: float

    def begin(self, tensor: Tensor) -> Moments:
        """No momentum."""
        return {"momentum": torch.zeros_like(tensor)}

    def move(self, change: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        """One round."""
        momentum = self.momentum * moments["momentum"] + change
        return self.lr * momentum, {"momentum": momentum}


class Nesterov(Momentum):
    """DiLoCo's outer optimizer (Douillard et al. 2023): SGD with Nesterov momentum.

    m = momentum * m + change; the step is lr * (change + momentum * m), as in torch.optim.SGD.
    """

    def move(self, change: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        """One round."""
        _, moved = super().move(change, moments)
        return self.lr * (change + self.momentum * moved["momentum"]), moved


@dataclass(frozen=True)
class Adam:
    """FedAdam (Reddi et al. 2021, Algorithm 2); it has no bias correction.

    m = b1 * m + (1 - b1) * change; v = b2 * v + (1 - b2) * change ** 2; the step is
    lr * m / (sqrt(v) + tau). v begins at tau ** 2.
    """

    lr: float
    betas: tuple[float, float]
    tau: float

    def begin(self, tensor: Tensor) -> Moments:
        """No momentum, and the smallest v that the paper allows."""
        return {"momentum": torch.zeros_like(tensor), "square": torch.full_like(tensor, self.tau**2)}

    def move(self, change: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        """One round."""
        momentum = self.betas[0] * moments["momentum"] + (1 - self.betas[0]) * change
        square = self._square(change.square(), moments["square"])
        return self.lr * momentum / (square.sqrt() + self.tau), {"momentum": momentum, "square": square}

    def _square(self, new: Tensor, old: Tensor) -> Tensor:
        return self.betas[1] * old + (1 - self.betas[1]) * new


class Yogi(Adam):
    """FedYogi (Reddi et al. 2021, Algorithm 2): v falls by steps of bounded size.

    As `Adam`, but v = v - (1 - b2) * change ** 2 * sign(v - change ** 2).
    """

    def _square(self, new: Tensor, old: Tensor) -> Tensor:
        return old - (1 - self.betas[1]) * new * (old - new).sign()


def rule_of(federation: FederationSection) -> Rule | None:
    """The rule of a run file; None for FedAvg, in which the reference becomes the mean."""
    lr, momentum = federation.server_learning_rate, federation.server_momentum
    match federation.server_optimizer:
        case "none":
            return None
        case "momentum":
            return Momentum(lr, momentum)
        case "nesterov":
            return Nesterov(lr, momentum)
        case "adam":
            return Adam(lr, federation.server_betas, federation.server_tau)
        case "yogi":
            return Yogi(lr, federation.server_betas, federation.server_tau)


class ServerOptimizer:
    """A rule and what it remembers of each tensor; fp32 by name."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._moments: dict[str, Moments] = {}

    def state(self) -> OptimizerState:
        """What the rule remembers of each tensor; empty before the first round."""
        return {name: dict(moments) for name, moments in self._moments.items()}

    def load_state(self, state: OptimizerState) -> None:
        """Go on from `state`."""
        self._moments = {
            name: {key: torch.as_tensor(value) for key, value in moments.items()} for name, moments in state.items()
        }

    def steps(self, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What to add to the reference for the clients' mean changes, which are left alone."""
        steps = {}
        for name, change in changes.items():
            moments = self._moments.get(name) or self._rule.begin(change)
            steps[name], self._moments[name] = self._rule.move(change, moments)
        return steps
