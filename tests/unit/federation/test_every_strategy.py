"""What holds of every strategy, from the clients' updates on the wire to the reference that they
move.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedbert_ds.config import FederationSection, OptimizerSection, WireSection
from fedbert_ds.errors import WireError
from fedbert_ds.federation.aggregator import Aggregator
from fedbert_ds.federation.averaging import combine
from fedbert_ds.federation.client_update import UpdateAssembler, update_chunks
from fedbert_ds.federation.server_optimizer import rule_of
from fedbert_ds.federation.strategy import strategy_of
from fedbert_ds.federation.update_exchange import UpdateExchange
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import NAMES

SHAPES = {"bias": (4,), "scale": (), "table": (3, 64)}
OPTIMIZER = OptimizerSection(name="adamw", lr=0.01, gradient_clipping=0.0)
CLIENTS = ("ada", "bo", "cy", "di")

RULES: dict[str, dict[str, Any]] = {
    "synchronous": {"mode": "synchronous"},
    "fedavg": {"mode": "parallel"},
    "fedavgm": {"mode": "parallel", "server_optimizer": "momentum"},
    "fedadam": {"mode": "parallel", "server_optimizer": "adam"},
    "fedyogi": {"mode": "parallel", "server_optimizer": "yogi"},
    "nesterov": {"mode": "parallel", "server_optimizer": "nesterov"},
    "sequential": {"mode": "sequential"},
}
AVERAGES = ("fedavg", "sequential")
"""Rules whose reference becomes what the clients have on average."""
SETTINGS = [(rule, codec) for rule in RULES for codec in ("fp32", "bf16", "int8")]


def tensors_of(seed: int, size: float = 1.0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) * size for name, shape in SHAPES.items()}


class Owner:
    """An aggregator and its exchange, as a rank wires them; `move` takes one window's updates."""

    def __init__(self, rule: str, codec: str = "fp32") -> None:
        federation = FederationSection(**RULES[rule])
        self.codec = codec
        self.strategy = strategy_of(federation, WireSection(updates=codec))  # type: ignore[arg-type]
        self.initial = tensors_of(0)
        self.aggregator = Aggregator(self.initial, self.strategy, OPTIMIZER, 10, rule_of(federation))
        self.window = 0

        def combined(updates: Mapping[str, Any], average: bool) -> dict[str, Tensor]:
            result = combine(list(updates.values()), SHAPES, average=average, group=None)
            return self.aggregator.answer(result) if average else result

        self.exchange = UpdateExchange(combined)

    def move(self, updates: Iterable[tuple[str, Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
        """Deliver (client, tensors, weight) in this order; the reference afterwards."""
        updates = list(updates)
        average = self.strategy.exchange_after(self.window) == "weights"
        self.exchange.expect(self.window, {client: int(weight) for client, _, weight in updates}, average)
        for client, tensors, _ in updates:
            chunks = list(update_chunks(self.window, tensors.items(), self.codec))
            self.exchange.deliver(self.window, client, partial(joined, client, chunks, self.codec))
        self.aggregator.apply(self.window, self._combined())
        self.window += 1
        return {name: tensor.clone() for name, tensor in self.aggregator.reference().weights.items()}

    def _combined(self) -> dict[str, Tensor]:
        deadline = time.monotonic() + 60
        while (result := self.exchange.poll()) is None:
            assert time.monotonic() < deadline, "nothing was combined"
            time.sleep(1e-4)
        return result[1]

    def close(self) -> None:
        self.exchange.close()
        self.aggregator.close()


def joined(client: str, chunks: Sequence[pb.UpdateChunk], codec: str) -> Any:
    """What the server makes of these chunks."""
    assembler = UpdateAssembler(SHAPES, f"client {client}: its update", codec)
    for chunk in chunks:
        update = assembler.add(chunk)
    assert update is not None
    return update


@pytest.mark.parametrize(("rule", "codec"), SETTINGS)
@settings(max_examples=6)
@given(
    orders=st.lists(st.permutations(CLIENTS), min_size=2, max_size=2),
    weights=st.lists(st.integers(1, 10**6), min_size=4, max_size=4),
)
def test_permuting_clients_changes_no_bit(rule: str, codec: str, orders: list[list[str]], weights: list[int]) -> None:
    """Over two windows: what moments remember is the same, too."""
    of = {client: (tensors_of(number + 1), float(weights[number])) for number, client in enumerate(CLIENTS)}
    one, other = Owner(rule, codec), Owner(rule, codec)
    for order in orders:
        mine = one.move((client, *of[client]) for client in CLIENTS)
        theirs = other.move((client, *of[client]) for client in order)
        assert all(torch.equal(mine[name], theirs[name]) for name in SHAPES)
    one.close()
    other.close()


@pytest.mark.parametrize(("rule", "codec"), [pair for pair in SETTINGS if pair[0] != "synchronous"])
@settings(max_examples=6)
@given(weights=st.lists(st.integers(1, 10**9).map(float), min_size=1, max_size=4))
def test_weights_sum_to_one(rule: str, codec: str, weights: list[float]) -> None:
    """So clients that all say the same move the reference as one of them does."""
    said = tensors_of(5)
    alone, together = Owner(rule, codec), Owner(rule, codec)
    expected = alone.move([("ada", said, 1.0)])
    got = together.move((client, said, weight) for client, weight in zip(CLIENTS, weights, strict=False))
    for name in SHAPES:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-7)
    alone.close()
    together.close()


@pytest.mark.parametrize("rule", AVERAGES)
@settings(max_examples=10)
@given(weight=st.integers(0, 2**53).map(float), size=st.sampled_from([1e-6, 1.0, 1e5]))
def test_one_client_is_the_identity(rule: str, weight: float, size: float) -> None:
    """Its weights are the reference, to the bit."""
    owner, own = Owner(rule), tensors_of(3, size)
    reference = owner.move([("ada", own, weight)])
    assert all(torch.equal(reference[name], own[name]) for name in SHAPES)
    owner.close()


@pytest.mark.parametrize("rule", AVERAGES)
@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_one_clients_coded_change_moves_the_reference_by_what_was_coded(rule: str, codec: str) -> None:
    owner, change = Owner(rule, codec), tensors_of(3, 1e-3)
    sent = joined("ada", list(update_chunks(0, change.items(), codec)), codec)
    # The answer to clients is coded as well, which rounds what is rounded already to itself.
    reference = owner.move([("ada", change, 7.0)])
    for name in SHAPES:
        torch.testing.assert_close(reference[name], owner.initial[name] + sent[name], rtol=0, atol=1e-6)
    owner.close()


def test_one_clients_gradient_is_a_step_of_its_own() -> None:
    owner, gradient = Owner("synchronous"), tensors_of(3)
    reference = owner.move([("ada", gradient, 1.0)])
    other = Owner("synchronous")
    other.aggregator.apply(0, copy.deepcopy(gradient))
    expected = other.aggregator.reference().weights
    assert all(torch.equal(reference[name], expected[name]) for name in SHAPES)
    owner.close()
    other.close()


# -- numbers that are none -------------------------------------------------------------------------

POISONS: dict[str, bytes] = {
    "fp32": b"\x00\x00\xc0\x7f", "bf16": b"\xc0\x7f", "fp8_e4m3": b"\x7f", "fp8_e5m2": b"\x7f",
}  # fmt: skip
"""NaN, little endian, where a code itself can be one."""


def poisoned(codec: str, where: str, value: float) -> list[pb.UpdateChunk]:
    """An update, one of whose values or scales is this one."""
    chunks = list(update_chunks(0, tensors_of(1).items(), codec))
    chunk = next(chunk for chunk in chunks if chunk.name == where)
    as_fp32 = torch.tensor([value]).numpy().tobytes()
    if codec == "fp32" or where != "table":
        chunk.payload = chunk.payload[:-4] + as_fp32
    elif codec == "bf16":
        chunk.payload = (
            torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes() + (chunk.payload[2:])
        )
    elif codec in ("int8_group", "int4_hadamard"):  # bf16 scales come last
        chunk.payload = (
            chunk.payload[:-2] + torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
        )
    else:
        chunk.payload = chunk.payload[:-4] + as_fp32
    return chunks


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["table", "bias"])
@pytest.mark.parametrize("codec", NAMES)
def test_a_number_that_is_none_is_refused_and_its_client_named(codec: str, where: str, value: float) -> None:
    """The others' update is combined without it."""
    owner = Owner("fedavg", codec)
    good = list(update_chunks(0, tensors_of(2).items(), codec))
    owner.exchange.expect(0, dict.fromkeys(["ada", "bo"], 1), average=True)
    owner.exchange.deliver(0, "bo", partial(joined, "bo", poisoned(codec, where, value), codec))
    owner.exchange.deliver(0, "ada", partial(joined, "ada", good, codec))
    deadline = time.monotonic() + 60
    while not (unsound := owner.exchange.take_unsound()):
        assert owner.exchange.poll() is None and time.monotonic() < deadline
    ((client, error),) = unsound
    assert client == "bo" and isinstance(error, WireError)
    assert str(error).startswith(f"client bo: its update: tensor {where!r}")
    assert "finite" in str(error) or "sane" in str(error)
    while (combined := owner.exchange.poll()) is None:
        assert time.monotonic() < deadline
    expected = joined("ada", good, codec)
    assert all(torch.equal(combined[1][name], expected[name]) for name in SHAPES)
    owner.close()


@pytest.mark.parametrize("codec", POISONS)
def test_a_code_that_stands_for_no_number_is_refused(codec: str) -> None:
    chunks = list(update_chunks(0, tensors_of(1).items(), codec))
    chunk = next(chunk for chunk in chunks if chunk.name == "table")
    chunk.payload = POISONS[codec] + chunk.payload[len(POISONS[codec]) :]
    with pytest.raises(WireError, match=r"^client bo: its update: tensor 'table'"):
        joined("bo", chunks, codec)
