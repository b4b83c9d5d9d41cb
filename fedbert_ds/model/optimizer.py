"""AdamW, SGD, LAMB and Muon from the run file's section; biases and LayerNorm do not decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedbert_ds.config import OptimizerSection
from fedbert_ds.model.muon import Muon, is_hidden_matrix
from fedbert_ds.model.partition import Partition

Named = Iterable[tuple[str, nn.Parameter]]


class Lamb(torch.optim.Optimizer):
    """LAMB: You et al. 2020, "Large Batch Optimization for Deep Learning", algorithm 2.

    With Adam's bias-corrected direction r and decay d, a parameter w moves by lr * ratio * (r + d *
    w), where ratio is ||w|| / ||r + d * w||, or 1 if either norm is 0. As in the authors' code,
    parameters without decay take ratio 1 unless their group says `adapt: True`. The paper bounds
    phi(||w||). Here the ratio itself is at most `max_trust_ratio`, reached only when the update is
    that many times smaller than the weights.

    Under DeepSpeed's ZeRO a group's parameters lie in one flat tensor, of which each rank has a
    part: `partitions` then says where. Each step of such a group with ratios sums squared norms
    over all ranks in one all-reduce. Every rank must step the same groups in the same order.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_trust_ratio: float = 10.0,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_trust_ratio": max_trust_ratio,
        }  # fmt: skip
        super().__init__(params, defaults)
        self.partitions: dict[Tensor, Partition] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step_group(group, parameters)
        return loss

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        # fp32 or wider
        weights = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        updates = self._directions(group, parameters, weights)
        if group.get("adapt", group["weight_decay"] > 0):
            partitions = [self.partitions.get(parameter) for parameter in parameters]
            ratios = self._trust_ratios(group["max_trust_ratio"], weights, updates, partitions)
            if moves := _views(updates, partitions):
                torch._foreach_mul_(moves, list(ratios.unbind()))
        torch._foreach_mul_(updates, group["lr"])
        torch._foreach_sub_(parameters, [u.to(p.dtype) for u, p in zip(updates, parameters, strict=True)])

    def _directions(self, group: dict[str, Any], parameters: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        """Adam's directions plus decay."""
        for parameter, weight in zip(parameters, weights, strict=True):
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
            state["step"] += 1
        states = [self.state[parameter] for parameter in parameters]
        first, second = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        gradients = [p.grad.to(w.dtype) for p, w in zip(parameters, weights, strict=True) if p.grad is not None]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)
        roots = torch._foreach_div(second, [1 - beta2 ** state["step"] for state in states])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(roots, [1 - beta1 ** state["step"] for state in states])
        directions = torch._foreach_div(first, roots)
        torch._foreach_add_(directions, weights, alpha=group["weight_decay"])
        return list(directions)

    def _trust_ratios(
        self, most: float, weights: list[Tensor], updates: list[Tensor], partitions: Sequence[Partition | None]
    ) -> Tensor:
        """One ratio for each of `_views`, fp32 or wider."""
        squares = torch.stack([_squares(_views(tensors, partitions), weights[0]) for tensors in (weights, updates)])
        counts = [1 if partition is None else len(partition.own) for partition in partitions]
        # A slice takes the ratio of its whole parameter.
        whole = [
            part if partition is None else partition.sums(part)
            for part, partition in zip(squares.split(counts, dim=1), partitions, strict=True)
        ]
        weight, move = torch.cat(whole, dim=1).sqrt()
        ratios = (weight / move).clamp(max=most)
        return torch.where((weight > 0) & (move > 0), ratios, torch.ones_like(ratios))


def _squares(tensors: list[Tensor], like: Tensor) -> Tensor:
    """Sums of squares, [tensors]."""
    return torch.stack(list(torch._foreach_norm(tensors))).square() if tensors else like.new_zeros(0)


def _views(tensors: Sequence[Tensor], partitions: Sequence[Partition | None]) -> list[Tensor]:
    """Each tensor itself, or what this rank has of each parameter in it; they share its memory."""
    return [
        view
        for tensor, partition in zip(tensors, partitions, strict=True)
        for view in ([tensor] if partition is None else partition.views(tensor))
    ]


def build_optimizer(
    named_parameters: Named, section: OptimizerSection, *, partitioned: bool = False, plain: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of a body or a client half; learning-rate schedules are the caller's.

    Biases and LayerNorm weights do not decay: two groups, one of which may be absent. Muon has one
    more, of the encoder's matrices. `partitioned` says that ZeRO will partition the groups: LAMB
    and Muon must then be told how, by their `partitions`. NVIDIA apex, where installed, runs AdamW
    and whole-parameter LAMB on CUDA, unless the optimizer is to be `plain`.
    """
    named = list(named_parameters)
    on_cuda = all(parameter.is_cuda for _, parameter in named)
    apex = _nvidia_apex() if on_cuda and not plain else None
    common: dict[str, Any] = {"lr": section.lr, "betas": section.betas, "eps": section.eps}
    two_groups = _two_groups(named, section)
    if section.name == "lamb":
        if apex is not None and not partitioned and section.weight_decay > 0:
            # apex adapts exactly the groups that decay, as `adapt` says here if any decays. The
            # caller clips gradients; apex would clip them once more.
            return apex.FusedLAMB(two_groups, **common, max_grad_norm=math.inf)
        return Lamb(two_groups, **common)
    fused = on_cuda or all(parameter.device.type == "cpu" for _, parameter in named)
    if section.name == "muon":
        matrices = [parameter for name, parameter in named if is_hidden_matrix(name, parameter)]
        others = [(name, parameter) for name, parameter in named if not is_hidden_matrix(name, parameter)]
        hidden = [{"params": matrices, "weight_decay": section.weight_decay, "muon": True}] if matrices else []
        return Muon([*hidden, *_two_groups(others, section)], section.momentum, **common, fused=fused)
    if section.name == "sgd":
        return torch.optim.SGD(two_groups, lr=section.lr)
    if apex is not None:
        return apex.FusedAdam(two_groups, **common, adam_w_mode=True)
    return torch.optim.AdamW(two_groups, **common, fused=fused)


def _two_groups(named: list[tuple[str, nn.Parameter]], section: OptimizerSection) -> list[dict[str, Any]]:
    """What decays, and adapts with LAMB, and what does not; one may be absent."""
    decayed = [parameter for name, parameter in named if is_decayed(name)]
    others = [parameter for name, parameter in named if not is_decayed(name)]
    return [
        {"params": parameters, "weight_decay": section.weight_decay if decays else 0.0}
        | ({"adapt": decays} if section.name == "lamb" else {})
        for parameters, decays in ((decayed, True), (others, False))
        if parameters
    ]


def is_decayed(name: str) -> bool:
    """Whether a parameter decays, by its Hugging Face name: biases and LayerNorm weights do not."""
    return not (name.endswith("bias") or "norm" in name.lower())


def _nvidia_apex() -> Any:
    # PyPI's apex is another project; only NVIDIA's has fused optimizers.
    try:
        from apex import optimizers
    except ImportError:
        return None
    return optimizers if hasattr(optimizers, "FusedAdam") else None
