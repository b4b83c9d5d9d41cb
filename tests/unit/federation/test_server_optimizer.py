"""Each rule against a computation by hand over three rounds, against torch, and saved and restored
in between.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedbert_ds.config import FederationSection
from fedbert_ds.federation.averaging import combine
from fedbert_ds.federation.client_update import ClientUpdate
from fedbert_ds.federation.server_optimizer import Adam, Momentum, Nesterov, Rule, ServerOptimizer, Yogi, rule_of

RULES = [
    Momentum(lr=0.5, momentum=0.8),
    Nesterov(lr=0.5, momentum=0.8),
    Adam(lr=0.1, betas=(0.9, 0.99), tau=0.01),
    Yogi(lr=0.1, betas=(0.9, 0.99), tau=0.01),
]
CHANGES = (0.5, -0.25, 1.0)


def names(rule: Rule) -> str:
    return type(rule).__name__.lower()


def steps_of(rule: Rule, changes: tuple[float, ...]) -> list[float]:
    optimizer = ServerOptimizer(rule)
    return [optimizer.steps({"it": torch.tensor([change])})["it"].item() for change in changes]


# -- by hand ---------------------------------------------------------------------------------------


def test_three_rounds_of_momentum_by_hand() -> None:
    # m: 0.5, 0.8 * 0.5 - 0.25 = 0.15, 0.8 * 0.15 + 1 = 1.12
    assert steps_of(RULES[0], CHANGES) == pytest.approx([0.25, 0.075, 0.56])


def test_three_rounds_of_nesterov_by_hand() -> None:
    # change + 0.8 * m: 0.9, -0.25 + 0.12 = -0.13, 1 + 0.896 = 1.896
    assert steps_of(RULES[1], CHANGES) == pytest.approx([0.45, -0.065, 0.948])


def test_three_rounds_of_adam_by_hand() -> None:
    # m: 0.05, 0.045 - 0.025 = 0.02, 0.018 + 0.1 = 0.118
    # v from 0.0001: 0.000099 + 0.0025 = 0.002599, 0.00257301 + 0.000625 = 0.00319801, 0.0031660299
    # + 0.01
    squares = (0.002599, 0.00319801, 0.0131660299)
    expected = [0.1 * m / (math.sqrt(v) + 0.01) for m, v in zip((0.05, 0.02, 0.118), squares, strict=True)]
    assert steps_of(RULES[2], CHANGES) == pytest.approx(expected)


def test_three_rounds_of_yogi_by_hand() -> None:
    # v rises by a hundredth of the square while it is below it: 0.0026, + 0.000625 = 0.003225, +
    # 0.01 = 0.013225
    expected = [0.1 * m / (math.sqrt(v) + 0.01) for m, v in ((0.05, 0.0026), (0.02, 0.003225), (0.118, 0.013225))]
    assert steps_of(RULES[3], CHANGES) == pytest.approx(expected)


def test_yogi_forgets_a_large_change_by_small_steps() -> None:
    """v - (1 - b2) * change ** 2, where Adam takes a share of v."""
    large, small = torch.tensor([10.0]), torch.tensor([0.1])
    for rule, expected in ((Adam(1.0, (0.0, 0.9), 1.0), 0.9 * 10.9 + 0.001), (Yogi(1.0, (0.0, 0.9), 1.0), 10.999)):
        _, moments = rule.move(large, rule.begin(large))
        _, moments = rule.move(small, moments)
        assert moments["square"].item() == pytest.approx(expected)


# -- properties ------------------------------------------------------------------------------------


def tensors_of(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {"table": torch.randn(3, 4, generator=random), "bias": torch.randn(4, generator=random)}


@pytest.mark.parametrize("kind", [Momentum, Nesterov])
def test_without_momentum_and_with_a_rate_of_one_it_is_fedavg(kind: Any) -> None:
    optimizer = ServerOptimizer(kind(lr=1.0, momentum=0.0))
    for seed in range(3):
        changes = tensors_of(seed)
        steps = optimizer.steps(changes)
        assert all(torch.equal(steps[name], changes[name]) for name in changes)


@pytest.mark.parametrize("nesterov", [False, True])
@settings(max_examples=30)
@given(lr=st.floats(0.01, 2.0), momentum=st.floats(0.01, 0.99), seeds=st.lists(st.integers(0, 99), min_size=3))
def test_momentum_steps_as_torchs_sgd(nesterov: bool, lr: float, momentum: float, seeds: list[int]) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    theirs = torch.optim.SGD([parameter], lr=lr, momentum=momentum, nesterov=nesterov)
    ours = ServerOptimizer((Nesterov if nesterov else Momentum)(lr, momentum))
    reference = torch.zeros(3, 4)
    for seed in seeds:
        change = tensors_of(seed)["table"]
        parameter.grad = -change
        theirs.step()
        reference = reference + ours.steps({"table": change})["table"]
    torch.testing.assert_close(reference, parameter.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=names)
@settings(max_examples=20)
@given(order=st.permutations(range(4)))
def test_permuting_clients_changes_nothing_but_rounding(rule: Rule, order: list[int]) -> None:
    updates = [ClientUpdate(tensors_of(seed), weight=1.0 + seed) for seed in range(4)]
    shapes = {name: tuple(tensor.shape) for name, tensor in updates[0].tensors.items()}
    one, other = (
        ServerOptimizer(rule).steps(combine(clients, shapes, average=True, group=None))
        for clients in (updates, [updates[number] for number in order])
    )
    for name in shapes:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", RULES, ids=names)
def test_a_restored_optimizer_goes_on_bit_for_bit(rule: Rule) -> None:
    whole, restored = ServerOptimizer(rule), ServerOptimizer(rule)
    for seed in range(3):
        whole.steps(tensors_of(seed))
    restored.load_state(copy.deepcopy(whole.state()))
    for seed in range(3, 6):
        one, other = whole.steps(tensors_of(seed)), restored.steps(tensors_of(seed))
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("rule", RULES, ids=names)
def test_arguments_are_left_alone_and_steps_are_fp32(rule: Rule) -> None:
    changes, optimizer = tensors_of(1), ServerOptimizer(rule)
    assert optimizer.state() == {}
    for _ in range(2):
        assert all(tensor.dtype is torch.float32 for tensor in optimizer.steps(changes).values())
    assert all(torch.equal(changes[name], tensor) for name, tensor in tensors_of(1).items())
    assert optimizer.state().keys() == changes.keys()


@pytest.mark.parametrize("rule", RULES, ids=names)
def test_without_a_change_nothing_moves(rule: Rule) -> None:
    assert steps_of(rule, (0.0, 0.0, 0.0)) == [0.0, 0.0, 0.0]


# -- the run file's --------------------------------------------------------------------------------


def test_the_rule_that_a_run_file_names() -> None:
    def rule(name: Any, **others: Any) -> Rule | None:
        return rule_of(FederationSection(mode="parallel", server_optimizer=name, **others))

    assert rule("none") is None
    assert rule("momentum") == Momentum(1.0, 0.9)
    assert rule("nesterov") == Nesterov(0.7, 0.9)
    assert rule("nesterov", server_lr=1.0, server_momentum=0.0) == Nesterov(1.0, 0.0)
    assert rule("adam") == Adam(1e-3, (0.9, 0.99), 1e-3)
    assert rule("yogi", server_lr=0.1, server_betas=(0.5, 0.6), server_tau=0.2) == Yogi(0.1, (0.5, 0.6), 0.2)
