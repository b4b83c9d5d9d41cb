"""The optimizer of a client half: whose gradients it takes, which it leaves, and how it goes on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from fedbert_ds.config import OptimizerSection
from fedbert_ds.federation.half_optimizer import HalfOptimizer

SHAPES = {"table": (5, 3), "bias": (3,), "layernorm.weight": (3,)}


def parameters() -> dict[str, Parameter]:
    random = torch.Generator().manual_seed(1)
    return {name: Parameter(torch.randn(shape, generator=random)) for name, shape in SHAPES.items()}


def gradients(window: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(100 + window)
    return {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("clips", [False, True])
def test_a_step_with_given_gradients_is_a_step_with_its_own_and_leaves_both(clips: bool) -> None:
    section = OptimizerSection(lr=0.1, gradient_clipping=0.5)
    own, given = parameters(), parameters()
    one, other = (HalfOptimizer(half, section, 4, clips=clips) for half in (own, given))
    for window in range(3):
        step = gradients(window)
        for name, parameter in own.items():
            parameter.grad = step[name].clone()
            given[name].grad = torch.full_like(parameter, 7.0)
        one.step(window)
        other.step_with(step, window)
        for name in SHAPES:
            assert torch.equal(own[name], given[name]), name
            assert own[name].grad is None, "they are used"
            assert torch.equal(given[name].grad, torch.full_like(given[name], 7.0)), "of later windows"
            assert torch.equal(step[name], gradients(window)[name]), "others may hold them"


def test_it_clips_only_where_it_is_asked_to() -> None:
    section = OptimizerSection(name="sgd", lr=1.0, schedule="constant", weight_decay=0.0, gradient_clipping=0.5)
    for clips, norm in ((True, 0.5), (False, 5.0)):
        half = {"bias": Parameter(torch.zeros(2))}
        HalfOptimizer(half, section, 4, clips=clips).step_with({"bias": torch.tensor([3.0, 4.0])}, 0)
        assert float(half["bias"].detach().norm()) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_another_one_goes_on_from_its_state(name: Any) -> None:
    section = OptimizerSection(name=name, lr=0.1, warmup_windows=2)
    first = parameters()
    one = HalfOptimizer(first, section, 6, clips=False)
    assert one.state() == {}
    for window in range(3):
        one.step_with(gradients(window), window)
    second = copy.deepcopy(first)
    # Numbered by groups of its own: the state is by name.
    other = HalfOptimizer(dict(reversed(second.items())), section, 6, clips=False)
    other.load_state(copy.deepcopy(one.state()))
    for window in range(3, 6):
        for optimizer in (one, other):
            optimizer.step_with(gradients(window), window)
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)
    assert str(one.state()) == str({name: other.state()[name] for name in one.state()})
