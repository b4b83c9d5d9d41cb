"""Rounds of clients that hold the whole model, without a network: replicas, averages, aggregator.

Every quantity goes through the wire's own chunks, as between processes.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unit.client.one_client import settings_of
from unit.client.test_whole_window import CPU, VOCABULARY, batch_of, whole_half

from fedbert_ds.client.replica import Replica
from fedbert_ds.client.whole_window import train_window
from fedbert_ds.config import FederationSection, OptimizerSection, WireSection
from fedbert_ds.data.masking import Batch
from fedbert_ds.errors import WireError
from fedbert_ds.federation.aggregator import Aggregator
from fedbert_ds.federation.averaging import combine
from fedbert_ds.federation.client_update import ClientUpdate, Tensors, UpdateAssembler, update_chunks
from fedbert_ds.federation.reference import from_bytes, reference_chunks, to_bytes
from fedbert_ds.federation.server_optimizer import rule_of
from fedbert_ds.federation.strategy import strategy_of
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.wire.messages import ClientSettings

SGD = OptimizerSection(name="sgd", lr=0.5, schedule="constant", gradient_clipping=0.0, weight_decay=0.0)
RULES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {"federation": {"proximal": 0.1}},
    "fedavg-int8": {"wire": {"updates": "int8"}},
    "fedadam": {"federation": {"server_optimizer": "adam", "server_lr": 0.01}},
    "diloco": {"federation": {"server_optimizer": "nesterov"}, "optimizer": OptimizerSection(lr=0.01)},
    "muloco": {
        "federation": {"server_optimizer": "nesterov"},
        "optimizer": OptimizerSection(name="muon", lr=0.02),
        "wire": {"updates": "int2_hadamard"},
    },
}


def settings_for(rule: str, average_every: int = 1) -> ClientSettings:
    sections = RULES[rule]
    federation = FederationSection(mode="parallel", average_every=average_every, **sections.get("federation", {}))
    return settings_of(
        federation=federation,
        optimizer=sections.get("optimizer", SGD),
        wire=WireSection(**sections.get("wire", {})),
        windows=6,
    )


class Federation:
    """Clients by name, each with its batches, around one aggregator."""

    def __init__(self, settings: ClientSettings, names: Sequence[str]) -> None:
        self.settings = settings
        initial = {name: parameter.detach() for name, parameter in whole_half().named_parameters()}
        strategy = strategy_of(settings.federation, settings.wire, "whole")
        self.aggregator = Aggregator(
            initial, strategy, settings.optimizer, settings.windows, rule_of(settings.federation)
        )
        self.halves = {name: whole_half() for name in names}
        self.masked: Counter[str] = Counter()
        """Each one's masked tokens since the last round."""
        self.replicas = {name: Replica(half, settings) for name, half in self.halves.items()}
        for replica in self.replicas.values():
            for message in reference_chunks(to_bytes(self.aggregator.reference())):
                replica.receive_reference(message.reference)

    def window(self, number: int, batches: dict[str, Batch]) -> None:
        """Everybody trains a window; after the last of a round, what comes of it is handed out."""
        codec, updates = self.settings.wire.updates, []
        for name in sorted(batches):
            batch = batches[name]
            list(train_window(self.halves[name], batch, 9, (name, number), CPU))
            masked = len(batch.labels)
            self.masked[name] += masked
            chunks = list(self.replicas[name].finish_window(number, sum(batch.lengths), masked, max(1, masked)))
            if chunks:
                update = received(chunks, self.aggregator.shapes, codec)
                updates.append(ClientUpdate(update, float(self.masked.pop(name))))
        if updates:
            mean = combine(updates, self.aggregator.shapes, average=True, group=None)
            answer = self.aggregator.answer(mean)
            self.aggregator.apply(number, answer)
            for replica in self.replicas.values():
                for chunk in update_chunks(number, answer.items(), codec):
                    replica.receive(chunk)

    @property
    def reference(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.aggregator.reference().weights.items()}


def received(chunks: Any, shapes: Any, codec: str) -> Tensors:
    joined = UpdateAssembler(shapes, "it", codec)
    for chunk in chunks:
        complete = joined.add(chunk)
    assert complete is not None
    return complete


def shard(seed: int, sequences: int = 3) -> Batch:
    return batch_of([4, 6, 3, 5, 2][:sequences], seed=seed)


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


def local_run(rule: str, windows: int) -> ClientHalf:
    """One client that nobody averages: its own optimizer alone."""
    settings = settings_for(rule, average_every=100)
    half = whole_half()
    replica = Replica(half, settings)
    for message in reference_chunks(to_bytes(Federation(settings, []).aggregator.reference())):
        replica.receive_reference(message.reference)
    for window in range(windows):
        batch = shard(window)
        list(train_window(half, batch, 9, ("ada", window), CPU))
        list(replica.finish_window(window, sum(batch.lengths), len(batch.labels), len(batch.labels)))
    return half


def test_fedavg_of_one_client_is_the_identity() -> None:
    """Its change comes back as it was sent, so averages leave no trace but fp32's rounding."""
    federation = Federation(settings_for("fedavg"), ["ada"])
    for window in range(4):
        federation.window(window, {"ada": shard(window)})
    alone = dict(local_run("fedavg", 4).named_parameters())
    assert largest_difference(federation.reference, alone) < 1e-6


@settings(max_examples=12)
@given(rule=st.sampled_from(sorted(RULES)), order=st.permutations(["ada", "bo", "cy"]))
def test_permuting_clients_changes_nothing(rule: str, order: list[str]) -> None:
    """Names are dealt to shards anew: sums run in another order, and no name has a meaning."""
    results = []
    for names in (["ada", "bo", "cy"], order):
        federation = Federation(settings_for(rule), names)
        for window in range(2):
            federation.window(window, {name: shard(10 * window + place, place + 1) for place, name in enumerate(names)})
        results.append(federation.reference)
    # Two bits round a last digit to another code now and then; the next round sends the difference.
    bound = 2e-2 if "int" in str(RULES[rule].get("wire", "")) else 1e-5
    assert largest_difference(*results) < bound


@pytest.mark.parametrize("rule", RULES)
def test_after_a_round_every_client_is_at_the_reference_to_the_bit(rule: str) -> None:
    federation = Federation(settings_for(rule, average_every=2), ["ada", "bo"])
    for window in range(4):
        federation.window(window, {"ada": shard(window), "bo": shard(50 + window, 5)})
        at_reference = [
            torch.equal(parameter, federation.reference[name])
            for half in federation.halves.values()
            for name, parameter in half.named_parameters()
        ]
        assert all(at_reference) == (window % 2 == 1)


@settings(max_examples=15)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_plain_sgd_averaged_every_window_is_centralized_training(sizes: list[int], seed: int) -> None:
    """With weights in proportion to masked tokens; the shares sum to one whatever they are."""
    names = [f"client {place}" for place in range(len(sizes))]
    federation = Federation(settings_for("fedavg"), names)
    central = whole_half()
    for window in range(3):
        batches = {
            name: shard(seed + 100 * window + place, size)
            for place, (name, size) in enumerate(zip(names, sizes, strict=True))
        }
        federation.window(window, batches)
        scale = 1 / max(1, sum(len(batch.labels) for batch in batches.values()))
        for batch in batches.values():
            inputs = batch.input_ids, batch.lengths, batch.masked_positions
            central.whole_backward(*inputs, batch.labels, scale, batch.token_types)
        with torch.no_grad():
            for parameter in central.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.5 * parameter.grad)
        central.zero_grad()
    assert largest_difference(federation.reference, dict(central.named_parameters())) < 1e-5


def test_two_bits_follow_exact_changes_because_rounding_is_owed_not_lost() -> None:
    """The same changes sent round after round, up and down through two bits: the reference stays a
    few roundings from the exact sum. Without what is owed, the error of every round would stay.
    """
    settings = settings_for("muloco").model_copy(update={"federation": FederationSection(mode="parallel")})
    random = torch.Generator().manual_seed(3)
    federation = Federation(settings, ["ada", "bo"])
    start = federation.reference
    changes = {name: {key: 0.01 * torch.randn(tensor.shape, generator=random) for key, tensor in start.items()}
               for name in ("ada", "bo")}  # fmt: skip
    errors = []
    for window in range(12):
        updates = []
        for name, half in federation.halves.items():
            with torch.no_grad():
                for key, parameter in half.named_parameters():
                    parameter.add_(changes[name][key])
            half.zero_grad()
            chunks = list(federation.replicas[name].finish_window(window, 1, 1, 1))
            updates.append(received(chunks, federation.aggregator.shapes, "int2_hadamard"))
        answer = federation.aggregator.answer(
            combine([ClientUpdate(update, 1.0) for update in updates], federation.aggregator.shapes, True, None)
        )
        federation.aggregator.apply(window, answer)
        for replica in federation.replicas.values():
            for chunk in update_chunks(window, answer.items(), "int2_hadamard"):
                replica.receive(chunk)
        exact = {key: start[key] + (window + 1) * (changes["ada"][key] + changes["bo"][key]) / 2 for key in start}
        errors.append(sum(float((federation.reference[key] - exact[key]).square().sum()) for key in start) ** 0.5)
    assert errors[-1] < 2 * max(errors[:3]), "bounded"
    assert errors[-1] < 0.25 * 12 * errors[0], "not one rounding a round"


def test_what_is_owed_is_in_the_checkpoint() -> None:
    one = Federation(settings_for("muloco"), ["ada"])
    one.window(0, {"ada": shard(0)})
    other = Federation(settings_for("muloco"), ["ada"])
    saved = to_bytes(one.aggregator.reference())
    other.aggregator.load(from_bytes(saved, other.aggregator.shapes)[0])
    assert to_bytes(other.aggregator.reference()) == saved
    other.replicas["ada"].load_state_dict(copy.deepcopy(one.replicas["ada"].state_dict()))
    for federation in (one, other):
        federation.window(1, {"ada": shard(1)})
    assert to_bytes(one.aggregator.reference()) == to_bytes(other.aggregator.reference())


def test_owed_changes_go_out_even_if_nobody_delivers() -> None:
    federation = Federation(settings_for("muloco"), ["ada"])
    federation.window(0, {"ada": shard(0)})
    names = list(federation.aggregator.shapes)
    answer = federation.aggregator.unchanged(names)
    assert any(tensor.any() for tensor in answer.values())
    exact = Federation(settings_for("fedavg"), [])
    assert not any(tensor.any() for tensor in exact.aggregator.unchanged(names).values())


def test_a_change_that_is_not_finite_is_refused_and_its_sender_named() -> None:
    federation = Federation(settings_for("fedavg"), ["ada"])
    batch = shard(0)
    list(train_window(federation.halves["ada"], batch, 9, (), CPU))
    with torch.no_grad():
        federation.halves["ada"].get_parameter("bert.embeddings.word_embeddings.weight")[VOCABULARY - 1, 0] = torch.nan
    chunks = federation.replicas["ada"].finish_window(0, 1, len(batch.labels), len(batch.labels))
    with pytest.raises(WireError, match="client ada: its update: tensor 'bert"):
        joined = UpdateAssembler(federation.aggregator.shapes, "client ada: its update")
        for chunk in chunks:
            joined.add(chunk)


def test_rows_that_no_step_touches_are_left_out_of_a_change() -> None:
    federation = Federation(settings_for("fedavg"), ["ada"])
    batch = shard(0)
    list(train_window(federation.halves["ada"], batch, 9, (), CPU))
    chunks = list(federation.replicas["ada"].finish_window(0, 1, len(batch.labels), len(batch.labels)))
    rows = {chunk.name: chunk.rows for chunk in chunks if chunk.rows}
    # Positions beyond the longest sequence, and the second token type.
    assert "bert.embeddings.position_embeddings.weight" in rows
