"""The aggregator's reference equals every client's replica to the bit, before and after it is
saved.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from unit.client.one_client import half_of, settings_of

from fedbert_ds.client.replica import Replica
from fedbert_ds.config import FederationSection, OptimizerSection, WireSection
from fedbert_ds.errors import RunError
from fedbert_ds.federation.aggregator import Aggregator
from fedbert_ds.federation.averaging import NobodyDelivered, combine
from fedbert_ds.federation.client_update import ClientUpdate, update_chunks
from fedbert_ds.federation.reference import from_bytes, reference_chunks, to_bytes
from fedbert_ds.federation.server_optimizer import ServerOptimizer, rule_of
from fedbert_ds.federation.strategy import strategy_of
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.wire.messages import ClientSettings


def aggregator_of(half: ClientHalf, settings: ClientSettings) -> Aggregator:
    strategy = strategy_of(settings.federation, settings.wire)
    initial = {name: parameter.detach() for name, parameter in half.named_parameters()}
    return Aggregator(initial, strategy, settings.optimizer, settings.windows, rule_of(settings.federation))


def updates(half: ClientHalf, windows: range) -> list[dict[str, Tensor]]:
    """What each window's updates were combined to; no row of one is without a value."""
    random = torch.Generator().manual_seed(11 + windows.start)
    return [
        {name: torch.randn(p.shape, generator=random) for name, p in half.named_parameters()} for _ in windows
    ]  # fmt: skip


def give(replica: Replica, settings: ClientSettings, window: int, combined: dict[str, Tensor]) -> None:
    for chunk in update_chunks(window, combined.items(), settings.wire.updates):
        replica.receive(chunk)


def assert_equal(half: ClientHalf, aggregator: Aggregator) -> None:
    weights = aggregator.reference().weights
    assert [name for name, parameter in half.named_parameters() if not torch.equal(parameter, weights[name])] == []


OPTIMIZERS = {
    "adamw": OptimizerSection(lr=0.02, warmup_windows=2),
    "lamb": OptimizerSection(name="lamb", lr=0.05),
    "sgd": OptimizerSection(name="sgd", lr=0.5, gradient_clipping=0.0),
}


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_summed_gradients_move_it_as_they_move_a_replica(optimizer: str, staleness: int, codec: Any) -> None:
    """With staleness each side clips the sum it receives."""
    settings = settings_of(
        optimizer=OPTIMIZERS[optimizer],
        federation=FederationSection(staleness=staleness),
        wire=WireSection(updates=codec),
    )
    half = half_of()
    aggregator, replica = aggregator_of(half, settings), Replica(half, settings)
    for window, combined in enumerate(updates(half, range(3))):
        kept = {name: tensor.clone() for name, tensor in combined.items()}
        aggregator.apply(window, combined)
        give(replica, settings, window, kept)
        assert_equal(half, aggregator)
        assert all(torch.equal(combined[name], kept[name]) for name in kept), "the clients' copy is another's"
    assert aggregator.reference().version == 3


@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("scope", ["embeddings+head", "head"])
def test_averages_take_its_place_and_averaged_changes_are_added(codec: Any, scope: Any) -> None:
    federation = FederationSection(mode="parallel", average_every=2, average_scope=scope)
    settings = settings_of(federation=federation, wire=WireSection(updates=codec))
    half = half_of()
    initial = {name: parameter.detach().clone() for name, parameter in half.named_parameters()}
    aggregator, replica = aggregator_of(half, settings), Replica(half, settings)
    for message in reference_chunks(to_bytes(aggregator.reference())):
        replica.receive_reference(message.reference)
    for window in (1, 3):
        (combined,) = updates(half, range(window, window + 1))
        combined = {n: t for n, t in combined.items() if scope != "head" or half.parameter_scope(n) == "head"}
        aggregator.apply(window, combined)
        give(replica, settings, window, combined)
        assert_equal(half, aggregator)
        assert aggregator.reference().version == window + 1
    weights = aggregator.reference().weights
    assert all(torch.equal(weights[name], initial[name]) == (name not in combined) for name in initial)
    assert not aggregator.reference().optimizer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_goes_on_from_what_was_saved_and_so_does_a_client_that_had_nothing(optimizer: str) -> None:
    settings = settings_of(optimizer=OPTIMIZERS[optimizer])
    half = half_of()
    whole = aggregator_of(half, settings)
    for window, combined in enumerate(updates(half, range(3))):
        whole.apply(window, combined)
    saved = to_bytes(whole.reference())
    again, fresh = aggregator_of(half, settings), Replica(half, settings)
    again.load(from_bytes(saved, again.shapes)[0])
    for message in reference_chunks(saved):
        fresh.receive_reference(message.reference)
    assert to_bytes(again.reference()) == saved
    for window, combined in enumerate(updates(half, range(3, 6)), 3):
        for aggregator in (whole, again):
            aggregator.apply(window, combined)
        give(fresh, settings, window, combined)
    assert to_bytes(again.reference()) == to_bytes(whole.reference())
    assert_equal(half, whole)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["momentum", "nesterov", "adam", "yogi"])
def test_a_server_optimizer_moves_it_and_goes_on_from_what_was_saved(name: Any, codec: Any) -> None:
    federation = FederationSection(mode="parallel", server_optimizer=name, server_lr=0.5)
    settings = settings_of(federation=federation, wire=WireSection(updates=codec))
    half = half_of()
    whole, again, replica = aggregator_of(half, settings), aggregator_of(half, settings), Replica(half, settings)
    for message in reference_chunks(to_bytes(whole.reference())):
        replica.receive_reference(message.reference)
    for window, mean in enumerate(updates(half, range(4))):
        if window == 2:
            again.load(from_bytes(to_bytes(whole.reference()), whole.shapes)[0])
        answer = whole.answer(mean)
        assert not any(torch.equal(answer[name], mean[name]) for name in mean)
        whole.apply(window, answer)
        give(replica, settings, window, answer)
        assert_equal(half, whole)
        if window >= 2:
            again.apply(window, again.answer(mean))
            assert to_bytes(again.reference()) == to_bytes(whole.reference())
    fresh = Replica(half_of(), settings)
    for message in reference_chunks(to_bytes(whole.reference())):
        assert fresh.receive_reference(message.reference) == message.reference.last
    assert not fresh.state_dict()["optimizer"], "the server optimizer is not a client's"


@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["momentum", "nesterov", "adam", "yogi"])
def test_weights_move_it_by_the_rule_of_their_change_and_are_left_alone(name: Any, codec: Any) -> None:
    """A coded mean is a mean change already."""
    federation = FederationSection(mode="parallel", server_optimizer=name, server_lr=0.5)
    half = half_of()
    aggregator = aggregator_of(half, settings_of(federation=federation, wire=WireSection(updates=codec)))
    rule = rule_of(federation)
    assert rule is not None
    oracle = ServerOptimizer(rule)
    for window, mean in enumerate(updates(half, range(3))):
        before = {name: tensor.clone() for name, tensor in aggregator.reference().weights.items()}
        kept = {name: tensor.clone() for name, tensor in mean.items()}
        changes = kept if codec == "int8" else {name: kept[name] - before[name] for name in kept}
        steps = oracle.steps(changes)
        answer = aggregator.answer(mean)
        for name, step in steps.items():
            assert torch.equal(answer[name], step if codec == "int8" else before[name] + step)
            assert torch.equal(mean[name], kept[name])
            assert torch.equal(aggregator.reference().weights[name], before[name]), "only `apply` moves it"
        aggregator.apply(window, answer)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_without_a_server_optimizer_one_client_gets_back_what_it_sent(codec: Any) -> None:
    settings = settings_of(federation=FederationSection(mode="parallel"), wire=WireSection(updates=codec))
    half = half_of()
    aggregator = aggregator_of(half, settings)
    (mine,) = updates(half, range(1))
    mean = combine([ClientUpdate(mine, 7.0)], aggregator.shapes, average=True, group=None)
    answer = aggregator.answer(mean)
    assert all(torch.equal(answer[name], mine[name]) for name in mine)


def test_an_update_nobody_exchanges_is_an_error_where_the_reference_is_read() -> None:
    half = half_of()
    settings = settings_of(federation=FederationSection(mode="parallel", average_every=2))
    aggregator = aggregator_of(half, settings)
    aggregator.apply(0, updates(half, range(1))[0])
    with pytest.raises(RunError, match="an update of window 0"):
        aggregator.reference()


def test_a_failed_move_is_told_though_later_ones_were_given_before_it_failed() -> None:
    let_go = threading.Event()

    class Unsound(dict[str, Tensor]):
        def items(self) -> Any:
            assert let_go.wait(20.0)
            raise ValueError("no tensors")

    half = half_of()
    aggregator = aggregator_of(half, settings_of())
    aggregator.apply(0, Unsound())
    aggregator.apply(1, updates(half, range(1))[0])
    let_go.set()
    with pytest.raises(ValueError, match="no tensors"):
        aggregator.reference()


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_window_whose_update_nobody_delivered_leaves_everybody_where_they_are(codec: Any) -> None:
    """Zeros would be taken for weights."""
    settings = settings_of(federation=FederationSection(mode="parallel"), wire=WireSection(updates=codec))
    half = half_of()
    aggregator = aggregator_of(half, settings)
    before = {name: tensor.clone() for name, tensor in aggregator.reference().weights.items()}
    with pytest.raises(NobodyDelivered):
        combine([], aggregator.shapes, average=True, group=None)
    aggregator.apply(0, aggregator.unchanged(before))
    after = aggregator.reference()
    assert after.version == 1 and all(torch.equal(after.weights[name], before[name]) for name in before)
