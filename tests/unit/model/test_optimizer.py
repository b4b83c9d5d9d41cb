"""LAMB against its paper, whole and in slices over ranks; which parameters decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from unit.model.thread_ranks import CUTS, flat_of, partition, run_ranks, whole_of

from fedbert_ds.config import OptimizerSection
from fedbert_ds.model.optimizer import Lamb, build_optimizer, is_decayed

SHAPES = {"dense.weight": (6, 4), "dense.bias": (6,), "LayerNorm.weight": (4,), "table.weight": (9, 4)}
STEPS = 4


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def section(name: str, **changes: Any) -> OptimizerSection:
    return OptimizerSection(**({"name": name, "lr": 0.02, "weight_decay": 0.1, "eps": 1e-6} | changes))


def run(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for name, gradient in gradients(step).items():
            named[name].grad = gradient.clone()
        optimizer.step()


def reference_lamb(named: dict[str, torch.Tensor], steps: int, lr: float, decay: float, eps: float) -> None:
    """Algorithm 2 of the paper line by line in fp64; ratio 1 for what is not decayed."""
    for name, start in named.items():
        weight = start.detach().double()
        first, second = torch.zeros_like(weight), torch.zeros_like(weight)
        matrix = name in ("dense.weight", "table.weight")
        for step in range(1, steps + 1):
            gradient = gradients(step - 1)[name].double()
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            ratio = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + eps)
            update = ratio + (decay * weight if matrix else 0.0)
            weight = weight - lr * (weight.norm() / update.norm() if matrix else 1.0) * update
        named[name] = weight


@pytest.mark.parametrize("betas", [(0.9, 0.98), (0.8, 0.999)])
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_adamw_takes_betas_eps_and_decay_as_torch_s(betas: tuple[float, float], eps: float) -> None:
    named, theirs = parameters(), parameters()
    run(build_optimizer(named.items(), section("adamw", betas=betas, eps=eps)), named, range(STEPS))
    decayed = [theirs["dense.weight"], theirs["table.weight"]]
    others = [theirs["dense.bias"], theirs["LayerNorm.weight"]]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    run(torch.optim.AdamW(groups, lr=0.02, betas=betas, eps=eps), theirs, range(STEPS))
    for name, weight in theirs.items():
        torch.testing.assert_close(named[name], weight, atol=0, rtol=1e-6)


def test_norms_and_biases_of_every_model_are_not_decayed(small_model, architecture) -> None:
    decayed = {name for name, _ in small_model(architecture).named_parameters() if is_decayed(name)}
    matrices = {name for name, parameter in small_model(architecture).named_parameters() if parameter.dim() == 2}
    assert decayed == matrices


@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_lamb_is_the_papers_algorithm(decay: float) -> None:
    named = parameters()
    expected: dict[str, torch.Tensor] = dict(parameters())
    reference_lamb(expected, STEPS, lr=0.02, decay=decay, eps=1e-6)
    run(build_optimizer(named.items(), section("lamb", weight_decay=decay)), named, range(STEPS))
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], atol=1e-6, rtol=1e-6)


def test_lamb_clamps_the_trust_ratio_and_leaves_zeros() -> None:
    large, zero = nn.Parameter(torch.full((4,), 1e6)), nn.Parameter(torch.zeros(4))
    optimizer = Lamb([{"params": [p], "weight_decay": 0.0, "adapt": True} for p in (large, zero)], lr=1.0, eps=0.0)
    large.grad, zero.grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    # Adam's first direction is 1: the ratio 1e6 is held at 10; a zero norm takes ratio 1.
    assert torch.equal(large, torch.full((4,), 1e6 - 10))
    assert torch.equal(zero, torch.full((4,), -1.0))


def test_parameters_without_gradient_stay() -> None:
    named = parameters()
    optimizer = build_optimizer(named.items(), section("lamb"))
    named["dense.weight"].grad = torch.ones(6, 4)
    optimizer.step()
    assert torch.equal(named["table.weight"], parameters()["table.weight"])
    assert not torch.equal(named["dense.weight"], parameters()["dense.weight"])


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_state_resumes_exactly(name: str) -> None:
    straight = parameters()
    run(build_optimizer(straight.items(), section(name)), straight, range(STEPS))
    resumed = parameters()
    first = build_optimizer(resumed.items(), section(name))
    run(first, resumed, range(2))
    second = build_optimizer(resumed.items(), section(name))
    second.load_state_dict(first.state_dict())
    run(second, resumed, range(2, STEPS))
    assert all(torch.equal(straight[key], resumed[key]) for key in SHAPES)


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_only_matrices_decay(name: str) -> None:
    named = parameters()
    optimizer = build_optimizer(named.items(), section(name))
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decays = {key: decay_of[id(parameter)] for key, parameter in named.items()}
    assert decays == {"dense.weight": 0.1, "dense.bias": 0.0, "LayerNorm.weight": 0.0, "table.weight": 0.1}
    assert len(optimizer.param_groups) == 2


def test_layer_norm_of_every_architecture_is_known() -> None:
    assert not is_decayed("lm_head.layer_norm.weight")
    assert not is_decayed("electra.embeddings.LayerNorm.weight")
    assert is_decayed("bert.encoder.layer.0.attention.output.dense.weight")


def test_adamw_is_torchs() -> None:
    named, expected = parameters(), parameters()
    run(build_optimizer(named.items(), section("adamw", weight_decay=0.0)), named, range(STEPS))
    run(torch.optim.AdamW(expected.values(), lr=0.02, eps=1e-6, weight_decay=0.0), expected, range(STEPS))
    for key in SHAPES:
        torch.testing.assert_close(named[key], expected[key], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3, 80])
@pytest.mark.parametrize("cut", CUTS)
def test_partitioned_lamb_equals_whole_lamb(cut: str, ranks: int) -> None:
    whole = parameters()
    groups = [group["params"] for group in build_optimizer(whole.items(), section("lamb")).param_groups]
    names = {parameter: name for name, parameter in whole.items()}
    groups = [[names[parameter] for parameter in group] for group in groups]
    shapes = [[SHAPES[name] for name in group] for group in groups]

    def run_rank(rank: int) -> list[torch.Tensor]:
        optimizer = build_optimizer(parameters().items(), section("lamb"))
        wheres = [partition(cut, of_group, rank, ranks) for of_group in shapes]
        for group, of_group, (where, length) in zip(groups, optimizer.param_groups, wheres, strict=True):
            start = [parameters()[name].detach() for name in group]
            of_group["params"] = [nn.Parameter(flat_of(start, where, length, padding=7.0))]
            optimizer.partitions[of_group["params"][0]] = where
        for step in range(STEPS):
            for group, of_group, (where, length) in zip(groups, optimizer.param_groups, wheres, strict=True):
                of_group["params"][0].grad = flat_of([gradients(step)[name] for name in group], where, length)
            optimizer.step()
        return [group["params"][0].detach() for group in optimizer.param_groups]

    run(build_optimizer(whole.items(), section("lamb")), whole, range(STEPS))
    flats = run_ranks(ranks, run_rank)
    for number, group in enumerate(groups):
        where, _ = partition(cut, shapes[number], 0, ranks)
        for name, found in zip(group, whole_of([each[number] for each in flats], where), strict=True):
            torch.testing.assert_close(found, whole[name].detach(), atol=1e-6, rtol=1e-6)
