"""Forwards and backwards: by the input's seed, in any order, counted or not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedbert_ds.config import ModelSection
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import split
from fedbert_ds.server.body.device_work import Device
from fedbert_ds.server.body.packed_input import BodyInput
from fedbert_ds.server.body.passes import Passes
from fedbert_kernels.encoded import Encoded

WIDTH, TOKENS = 8, 6
CPU = torch.device("cpu")


@pytest.fixture
def body() -> Any:
    """Small, with dropout."""
    section = ModelSection(hidden_size=WIDTH, num_attention_heads=2, num_hidden_layers=2, dropout=0.5)
    return split(build_model(section, 30, 0, 1), "embeddings")[1].train()


@pytest.fixture
def passes(body: Any, monkeypatch: pytest.MonkeyPatch) -> Passes:
    """The body's, at stage 0, on one rank."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: None)
    engine = SimpleNamespace(module=body, optimizer=SimpleNamespace())
    return Passes(engine, 0, {parameter: parameter for parameter in body.parameters()}, Device(CPU))


def body_input(seed: int) -> BodyInput:
    values = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    bounds = torch.tensor([0, 2, TOKENS], dtype=torch.int32)
    return BodyInput([Encoded.of(values, "fp32")], torch.tensor([0, 3, 4]), bounds, None, seed)


def started(passes: Passes, seed: int) -> tuple[Tensor, Tensor]:
    activations = body_input(seed).values(torch.float32).requires_grad_(True)
    return activations, passes.forward(body_input(seed), activations)


def sums(passes: Passes, body: Any) -> Tensor:
    """The window's gradient, which is then dropped."""
    passes.gradient.give()
    found = torch.cat([parameter.grad.flatten() for parameter in body.parameters()])
    passes.gradient.drop()
    return found


def test_a_micro_batch_has_its_own_dropout_in_any_order(passes: Passes, body: Any) -> None:
    one, other = started(passes, 1)[1], started(passes, 2)[1]
    assert torch.equal(started(passes, 2)[1], other) and torch.equal(started(passes, 1)[1], one)
    body.eval()
    state = torch.get_rng_state()
    started(passes, 1)
    assert torch.equal(torch.get_rng_state(), state), "an evaluation draws nothing"


def test_backwards_in_any_order_add_up_and_both_is_a_forward_and_its_backward(passes: Passes, body: Any) -> None:
    in_flight = {seed: started(passes, seed) for seed in (1, 2)}
    gradients = {seed: torch.randn(3, WIDTH) for seed in (1, 2)}
    for seed in (2, 1):
        activations, hidden = in_flight[seed]
        assert passes.backward(hidden, gradients[seed], activations).shape == (TOKENS, WIDTH)
    apart = sums(passes, body)
    for seed in (2, 1):
        passes.both(body_input(seed), gradients[seed])
    assert torch.equal(sums(passes, body), apart) and apart.any()


def test_what_does_not_add_up_is_told_all_the_same(passes: Passes, body: Any) -> None:
    activations, hidden = started(passes, 1)
    gradient = torch.randn(3, WIDTH)
    told = passes.backward(hidden, gradient, activations, adds_up=False)
    assert told.any() and not sums(passes, body).any()
    activations, hidden = started(passes, 1)
    assert torch.equal(passes.backward(hidden, gradient, activations), told)
    passes.gradient.drop()
    passes.both(body_input(1))
    assert not sums(passes, body).any()


def test_below_stage_3_nothing_is_gathered_or_lent(passes: Passes, body: Any) -> None:
    before = [parameter.data_ptr() for parameter in body.parameters()]
    passes.renew()
    with passes.weights_lent():
        assert [parameter.data_ptr() for parameter in body.parameters()] == before
