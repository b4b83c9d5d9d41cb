"""A client's replica: how it steps, what it sends after a window and what it makes of what comes
back.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from unit.client.one_client import Server, Text, batch_of, half_of, settings_of, unsplit

from fedbert_ds.client.replica import Replica
from fedbert_ds.config import FederationSection, OptimizerSection, WireSection
from fedbert_ds.errors import WireError
from fedbert_ds.federation.client_update import update_chunks
from fedbert_ds.federation.reference import Reference, reference_chunks, to_bytes
from fedbert_ds.model.client_half import ClientHalf


def begin(replica: Replica, half: ClientHalf) -> None:
    """Give a replica the half's own weights as the reference."""
    for message in reference_chunks(to_bytes(Reference(0, dict(half.named_parameters())))):
        replica.receive_reference(message.reference)


def test_a_synchronous_half_steps_with_everybodys_gradients(tmp_path: Path) -> None:
    server = Server(tmp_path, half_of())
    server.begin()
    server.window()
    server.take_update()
    before = {name: parameter.detach().clone() for name, parameter in server.half.named_parameters()}
    assert all(torch.equal(parameter, before[name]) for name, parameter in server.half.named_parameters())
    everybody = {name: torch.full_like(tensor, 0.25) for name, tensor in before.items()}
    server.give_update(everybody)
    for name, parameter in server.half.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.5 * 0.25)
    assert server.take("manifest").window == 1, "drawn when window 0 was planned"


def test_a_parallel_half_steps_by_its_own_mean_loss(tmp_path: Path) -> None:
    """M is everybody's; in FedAvg a client follows the mean over its own masked tokens."""
    server = Server(tmp_path, half_of(), federation=FederationSection(mode="parallel", average_every=2))
    server.begin()
    before = {name: parameter.detach().clone() for name, parameter in server.half.named_parameters()}
    batch = Text().next_batch(0, 0)
    _, expected = unsplit(server.half, batch, masked_tokens=len(batch.labels))
    server.window(masked_tokens=1000)
    assert not server.answers
    for name, parameter in server.half.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.5 * expected[name], atol=1e-5, rtol=1e-4)
    second = server.window()
    assert second > 0
    weights = server.take_update()
    assert all(torch.equal(weights[name], parameter) for name, parameter in server.half.named_parameters())
    server.give_update({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, window=1)
    assert not any(parameter.any() for parameter in server.half.parameters())


@pytest.mark.parametrize("scope", ["embeddings", "head"])
def test_what_is_not_averaged_never_leaves(tmp_path: Path, scope: Any) -> None:
    federation = FederationSection(mode="parallel", average_scope=scope)
    server = Server(tmp_path, half_of(), federation=federation)
    server.begin()
    server.window()
    weights = server.take_update()
    assert weights and {server.half.parameter_scope(name) for name in weights} == {scope}
    personal = {n: p.detach().clone() for n, p in server.half.named_parameters() if n not in weights}
    assert personal
    server.give_update({name: torch.zeros_like(tensor) for name, tensor in weights.items()})
    for name, parameter in server.half.named_parameters():
        assert torch.equal(parameter, personal[name]) if name in personal else not parameter.any()


def test_the_learning_rate_follows_the_schedule_and_gradients_are_clipped(tmp_path: Path) -> None:
    optimizer = OptimizerSection(name="sgd", lr=1.0, warmup_windows=4, gradient_clipping=0.1, weight_decay=0.0)
    # Without staleness the server clips, by the norm of the whole gradient.
    server = Server(tmp_path, half_of(), optimizer=optimizer, federation=FederationSection(staleness=1))
    server.begin()
    server.window()
    server.take_update()
    before = torch.cat([parameter.detach().flatten() for parameter in server.half.parameters()])
    server.give_update({name: torch.full_like(p, 3.0) for name, p in server.half.named_parameters()})
    after = torch.cat([parameter.detach().flatten() for parameter in server.half.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.25 * 0.1, rel=1e-3)


@pytest.mark.parametrize("mode", ["synchronous", "parallel"])
def test_with_staleness_the_next_window_goes_on_before_the_exchange(tmp_path: Path, mode: Any) -> None:
    """Steps equal a plain reference in which each window's gradients are of the weights that were
    there then.
    """
    federation = FederationSection(mode=mode, staleness=1)
    server = Server(tmp_path, half_of(), federation=federation)
    reference = half_of()
    server.begin()
    masked = [len(batch_of(window).labels) for window in range(2)]
    server.window(masked_tokens=masked[0])
    sent = [server.take_update()]
    # Window 1, though what window 0 combines is not back.
    server.window(masked_tokens=masked[1], first=20)
    sent.append(server.take_update())
    server.plan([], masked_tokens=40, first=30)
    server.give_credit(30)
    assert not server.answers, "two windows ahead is too far"

    def step(gradients: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                parameter -= 0.5 * gradients[name]

    _, first = unsplit(reference, batch_of(0), masked[0])
    if mode == "synchronous":
        _, second = unsplit(reference, batch_of(1), masked[1])
        for name in first:
            torch.testing.assert_close(sent[0][name], first[name], atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(sent[1][name], second[name], atol=1e-6, rtol=1e-4)
        server.give_update(sent[0], window=0)
        server.give_update(sent[1], window=1)
        step(first)
        step(second)
    else:
        step(first)
        after_first = copy.deepcopy(reference.state_dict())
        step(unsplit(reference, batch_of(1), masked[1])[1])
        # The average is elsewhere; the step that was made since is kept.
        server.give_update({name: tensor + 1.0 for name, tensor in sent[0].items()}, window=0)
        for name, parameter in reference.named_parameters():
            torch.testing.assert_close(sent[0][name], after_first[name], atol=1e-6, rtol=1e-4)
            parameter.data += 1.0
    for (name, got), (_, wanted) in zip(server.half.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4, msg=name)
    server.take_activations(30)


def test_a_half_that_gave_a_gradient_for_nothing_steps_by_its_mean(tmp_path: Path) -> None:
    """The head has gradients of pieces that were skipped then; they must not count as if M were its
    own.
    """
    server = Server(tmp_path, half_of(), federation=FederationSection(mode="parallel", average_every=10))
    server.begin()
    head = {n: p.detach().clone() for n, p in server.half.named_parameters()}
    _, expected = unsplit(server.half, batch_of(0), masked_tokens=len(batch_of(0).labels))
    server.plan([], 1000)
    server.open(10)
    server.hidden(10)
    server.skip(0, 10)
    for name, parameter in server.half.named_parameters():
        if server.half.parameter_scope(name) == "head" and "bias" in name:
            torch.testing.assert_close(parameter.detach(), head[name] - 0.5 * expected[name], atol=1e-5, rtol=1e-4)


def test_an_update_after_a_window_without_an_exchange_is_one_line() -> None:
    replica = Replica(half_of(), settings_of(federation=FederationSection(mode="parallel", average_every=2)))
    *chunks, last = update_chunks(2, dict(half_of().named_parameters()).items())
    for chunk in chunks:
        assert not replica.receive(chunk)
    with pytest.raises(WireError, match="an update of window 2, after which none is exchanged"):
        replica.receive(last)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_checkpoint_brings_back_all_that_decides_the_next_update(codec: Any) -> None:
    """Weights, moments, what has been counted since the average, and what coding owes."""

    def trained(replica: Replica, half: ClientHalf, windows: range) -> list[bytes]:
        sent = []
        for window in windows:
            for number, parameter in enumerate(half.parameters()):
                parameter.grad = torch.full_like(parameter, 0.01 * (number + window))
            sent += list(replica.finish_window(window, tokens=10, masked=3, all_masked=6))
        return [chunk.SerializeToString() for chunk in sent]

    changes: dict[str, Any] = {
        "federation": FederationSection(mode="parallel", average_every=2),
        "optimizer": OptimizerSection(lr=0.01),
        "wire": WireSection(updates=codec),
    }
    halves = half_of(), half_of()
    first, again = (Replica(half, settings_of(**changes)) for half in halves)
    begin(first, halves[0])
    assert trained(first, halves[0], range(1)) == []
    assert trained(first, halves[0], range(1, 2)) != []
    trained(first, halves[0], range(2, 3))
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    assert trained(again, halves[1], range(3, 4)) == trained(first, halves[0], range(3, 4)) != []
    assert again.flops_per_token() == first.flops_per_token() > 0


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_the_proximal_term_draws_averaged_weights_to_the_common_ones(codec: Any) -> None:
    """Plain SGD without a gradient of the loss: w moves by lr * mu * (w_common - w); what is
    personal stays.
    """
    half = half_of()
    federation = FederationSection(mode="parallel", average_every=2, average_scope="head", proximal=0.25)
    replica = Replica(half, settings_of(federation=federation, wire=WireSection(updates=codec)))
    begin(replica, half)

    def expected_after(start: dict[str, Tensor], common: dict[str, Tensor]) -> dict[str, Tensor]:
        pull = {n: 0.25 * (start[n] - common[n]) if half.parameter_scope(n) == "head" else 0.0 for n in start}
        return {name: tensor - 0.5 * pull[name] for name, tensor in start.items()}

    def weights() -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in half.named_parameters()}

    common = weights()
    with torch.no_grad():
        for parameter in half.parameters():
            parameter.add_(1.0)
    for window in range(2):
        start = weights()
        list(replica.finish_window(window, tokens=10, masked=3, all_masked=6))
        torch.testing.assert_close(weights(), expected_after(start, common))
    answer = {n: torch.full_like(t, 2.0) for n, t in common.items() if half.parameter_scope(n) == "head"}
    for chunk in update_chunks(1, answer.items(), codec):
        replica.receive(chunk)
    common = weights()
    restored = half_of()
    again = Replica(restored, settings_of(federation=federation, wire=WireSection(updates=codec)))
    again.load_state_dict(copy.deepcopy(replica.state_dict()))
    for one, it in ((replica, half), (again, restored)):
        with torch.no_grad():
            for parameter in it.parameters():
                parameter.add_(1.0)
        list(one.finish_window(2, tokens=10, masked=3, all_masked=6))
    start = {name: tensor + 1.0 for name, tensor in common.items()}
    torch.testing.assert_close(weights(), expected_after(start, common))
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), restored.parameters(), strict=True))
