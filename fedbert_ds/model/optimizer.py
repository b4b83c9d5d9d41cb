"""AdamW, SGD, LAMB and Muon from the run file's section; biases and LayerNorm do not decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from fedbert_ds.config import OptimizerSection
from fedbert_ds.model.muon import Muon, is_hidden_matrix

Named = Iterable[tuple[str, nn.Parameter]]


class Lamb(torch.optim.Optimizer):
    """LAMB: You et al. 2020, "Large Batch Optimization for Deep Learning", algorithm 2.

    With Adam's bias-corrected direction r and decay d, a parameter w moves by lr * ratio * (r + d *
    w), where ratio is ||w|| / ||r + d * w||, or 1 if either norm is 0. As in the authors' code,
    parameters without decay take ratio 1 unless their group says `adapt: True`. The paper bounds
    phi(||w||). Here the ratio itself is at most `max_trust_ratio`, reached only when the update is
    that many times smaller than the weights.

    Under DeepSpeed's ZeRO a rank holds a slice of each flattened parameter group. Give each
    parameter its own group and say `partitioned=True`: each step then sums the squared norms over
    all ranks, one all-reduce for all groups, and the ratio is that of the whole parameter. Every
    rank must step the same groups in the same order.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_trust_ratio: float = 10.0,
        partitioned: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_trust_ratio": max_trust_ratio,
        }  # fmt: skip
        super().__init__(params, defaults)
        self.partitioned = partitioned

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        if not members:
            return loss
        updates = [self._direction(group, parameter) for group, parameter in members]
        ratios = self._trust_ratios(members, updates)
        for (group, parameter), update, ratio in zip(members, updates, ratios, strict=True):
            if parameter.grad is not None:
                parameter.sub_((update * (ratio * group["lr"])).to(parameter.dtype))
        return loss

    def _direction(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        """Adam's direction plus decay, fp32 or wider; 0 without a gradient."""
        working = torch.promote_types(parameter.dtype, torch.float32)
        if parameter.grad is None:
            return torch.zeros_like(parameter, dtype=working)
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=working)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=working)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        gradient = parameter.grad.to(working)
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        direction = state["exp_avg"] / root.mul_(1 - beta1 ** state["step"])
        return direction.add_(parameter.to(working), alpha=group["weight_decay"])

    def _trust_ratios(self, members: list[tuple[dict[str, Any], Tensor]], updates: list[Tensor]) -> Tensor:
        """One ratio for each member, [members].

        From the squared norms of weights and updates, [2, members] fp32 or wider.
        """
        squares = torch.stack(
            [
                torch.stack(
                    [
                        parameter.to(update.dtype).square().sum()
                        for (_, parameter), update in zip(members, updates, strict=True)
                    ]
                ),
                torch.stack([update.square().sum() for update in updates]),
            ]
        )
        if self.partitioned:
            torch.distributed.all_reduce(squares)
        weights, moves = squares.sqrt()
        bounds = squares.new_tensor([group["max_trust_ratio"] for group, _ in members])
        adapted = torch.tensor(
            [bool(group.get("adapt", group["weight_decay"] > 0)) for group, _ in members], device=squares.device
        )
        ratios = torch.minimum(weights / moves, bounds)
        return torch.where(adapted & (weights > 0) & (moves > 0), ratios, torch.ones_like(ratios))


def build_optimizer(
    named_parameters: Named, section: OptimizerSection, *, partitioned: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of a body or a client half; learning-rate schedules are the caller's.

    Biases and LayerNorm weights do not decay. AdamW and SGD get two groups (one may be absent),
    LAMB one parameter a group, Muon one group more, of the encoder's matrices. `partitioned` says
    that the parameters will be slices of ZeRO groups, which LAMB's norms need to know, and which
    Muon cannot step: ValueError. NVIDIA apex, where installed, runs AdamW and
    whole-parameter LAMB on CUDA.
    """
    named = list(named_parameters)
    on_cuda = all(parameter.is_cuda for _, parameter in named)
    apex = _nvidia_apex() if on_cuda else None
    common: dict[str, Any] = {"lr": section.lr, "betas": section.betas, "eps": section.eps}
    if section.name == "lamb":
        groups = [
            {
                "params": [parameter],
                "weight_decay": section.weight_decay if is_decayed(name) else 0.0,
                "adapt": is_decayed(name),
            }
            for name, parameter in named
        ]
        if apex is not None and not partitioned and section.weight_decay > 0:
            # apex adapts exactly the groups that decay, as `adapt` says here if any decays. The
            # caller clips gradients; apex would clip them once more.
            return apex.FusedLAMB(groups, **common, max_grad_norm=math.inf)
        return Lamb(groups, **common, partitioned=partitioned)
    fused = on_cuda or all(parameter.device.type == "cpu" for _, parameter in named)
    if section.name == "muon":
        if partitioned:
            raise ValueError("Muon steps whole matrices, not slices of them")
        matrices = [parameter for name, parameter in named if is_hidden_matrix(name, parameter)]
        named = [(name, parameter) for name, parameter in named if not is_hidden_matrix(name, parameter)]
        hidden = [{"params": matrices, "weight_decay": section.weight_decay, "muon": True}] if matrices else []
        return Muon([*hidden, *_two_groups(named, section)], section.momentum, **common, fused=fused)
    two_groups = _two_groups(named, section)
    if section.name == "sgd":
        return torch.optim.SGD(two_groups, lr=section.lr)
    if apex is not None:
        return apex.FusedAdam(two_groups, **common, adam_w_mode=True)
    return torch.optim.AdamW(two_groups, **common, fused=fused)


def _two_groups(named: list[tuple[str, nn.Parameter]], section: OptimizerSection) -> list[dict[str, Any]]:
    """What decays and what does not; one may be absent."""
    decayed = [parameter for name, parameter in named if is_decayed(name)]
    others = [parameter for name, parameter in named if not is_decayed(name)]
    return [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, section.weight_decay), (others, 0.0))
        if parameters
    ]


def is_decayed(name: str) -> bool:
    """Whether a parameter decays, by its Hugging Face name: biases and LayerNorm weights do not."""
    return not (name.endswith("bias") or "layernorm" in name.lower().replace("_", ""))


def _nvidia_apex() -> Any:
    # PyPI's apex is another project; only NVIDIA's has fused optimizers.
    try:
        from apex import optimizers
    except ImportError:
        return None
    return optimizers if hasattr(optimizers, "FusedAdam") else None
