"""Micro-batches through the body: what seeds dropout, what a missing gradient is, what is sent and
what counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from unit.server.fake_client import WIDTH, FakeClient
from unit.server.fakes import FakeEngine, Rank, contract, run_config

from fedbert_ds.server.body.device_work import DeviceWork
from fedbert_ds.server.body.packed_input import BodyInput
from fedbert_ds.server.contract import Arrived
from fedbert_ds.server.micro_batches import MicroBatches
from fedbert_ds.server.queue.decisions import Backward, Forward
from fedbert_ds.server.queue.packing import Piece
from fedbert_ds.telemetry.trace import Trace
from fedbert_ds.wire.messages import Manifest
from fedbert_kernels.encoded import Encoded

ADA, BO = Piece("ada", 0, 1, 3, 1), Piece("bo", 0, 1, 2, 2)
MANIFESTS = (Manifest("ada", 0, (3,), (1,)), Manifest("bo", 0, (2,), (2,)))
ARRIVED = [
    Arrived(Encoded.of(torch.ones(3, WIDTH), "fp32"), None, torch.tensor([2])),
    Arrived(Encoded.of(torch.full((2, WIDTH), 5.0), "fp32"), None, torch.tensor([0, 1])),
]


class Engine(FakeEngine):
    """Keeps what it is given; nothing is done until `done` says so."""

    def __init__(self) -> None:
        super().__init__(seconds=2.0, device_work=self._started)
        self.inputs: list[BodyInput] = []
        self.gradients: list[Encoded] = []
        self.done = True

    def forward(self, micro_batch: int, body_input: BodyInput, codec: str = "") -> DeviceWork:
        self.inputs.append(body_input)
        return super().forward(micro_batch, body_input, codec)

    def backward(self, micro_batch: int, parts: Sequence[Encoded], codec: str = "") -> DeviceWork:
        self.gradients.append(Encoded.join(parts))
        return super().backward(micro_batch, parts, codec)

    def _started(self, encoded: Encoded, seconds: float) -> DeviceWork:
        engine = self

        class Work(DeviceWork):
            @property
            def is_done(self) -> bool:
                return engine.done

        return Work(encoded, seconds)


class Outbox:
    """Frames at once, and keeps who got what."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []

    def send_framed(self, client: str, make: Any) -> None:
        self.sent.append((client, make().WhichOneof("body")))


def made(seed: int = 1, rank: int = 0) -> tuple[MicroBatches, Engine, Outbox]:
    config = run_config()
    engine: Any = Engine()
    outbox: Any = Outbox()
    micro_batches = MicroBatches(engine, contract(config), config.wire, outbox, Trace(None), seed, rank)
    return micro_batches, engine, outbox


def ones(rows: int) -> Encoded:
    return Encoded.of(torch.ones(rows, WIDTH), "fp32")


def seeds(
    first_index: int, window: int = 0, seed: int = 1, rank: int = 0, order: tuple[int, ...] = (0, 1)
) -> list[int]:
    """Dropout seeds of a window's micro-batches by their place in it."""
    micro_batches, engine, _ = made(seed, rank)
    micro_batches.begin(window, [first_index, first_index + 1], MANIFESTS, masked_tokens=3)
    for place in order:
        micro_batches.forward(Forward(first_index + place, (ADA, BO)), ARRIVED)
    by_place = dict(zip(order, engine.inputs, strict=True))
    return [by_place[place].seed for place in (0, 1)]


def test_dropout_follows_the_run_the_window_the_rank_and_the_place_alone() -> None:
    base = seeds(0)
    assert base == seeds(0) == seeds(700), "not the index, which counts on over windows"
    assert base == seeds(0, order=(1, 0)), "nor the order"
    others = [seeds(0, window=1), seeds(0, seed=2), seeds(0, rank=1)]
    assert len({*base, *(seed for pair in others for seed in pair)}) == 8


def test_a_piece_without_a_gradient_gets_zeros_and_hears_nothing() -> None:
    micro_batches, engine, outbox = made()
    micro_batches.begin(0, [0], MANIFESTS, masked_tokens=3)
    micro_batches.forward(Forward(0, (ADA, BO)), ARRIVED)
    micro_batches.backward(Backward(0, (BO,)), {"bo": ones(2)})
    micro_batches.end()
    (gradient,) = engine.gradients
    assert torch.equal(gradient.decode(), torch.cat([torch.zeros(1, WIDTH), torch.ones(2, WIDTH)]))
    assert outbox.sent == [("ada", "hidden"), ("bo", "hidden"), ("bo", "input_gradient")]


def test_results_are_sent_when_the_device_has_them_in_order() -> None:
    micro_batches, engine, outbox = made()
    micro_batches.begin(0, [0, 1], MANIFESTS, masked_tokens=3)
    engine.done = False
    micro_batches.forward(Forward(0, (ADA,)), ARRIVED[:1])
    micro_batches.forward(Forward(1, (BO,)), ARRIVED[1:])
    micro_batches.send_finished()
    assert outbox.sent == [] and micro_batches.has_pending_sends
    micro_batches.send_finished(wait=True)
    assert outbox.sent == [("ada", "hidden")], "the oldest alone is waited for"
    engine.done = True
    micro_batches.send_finished()
    assert outbox.sent[1:] == [("bo", "hidden")] and not micro_batches.has_pending_sends


def test_a_dummy_keeps_ranks_in_step_and_is_no_work() -> None:
    micro_batches, _, outbox = made()
    micro_batches.begin(0, [0, 1], MANIFESTS, masked_tokens=3)
    micro_batches.forward(Forward(0, (ADA, BO)), ARRIVED)
    micro_batches.forward(Forward(1, ()), [])
    micro_batches.backward(Backward(1, ()), {})
    gradients = {"ada": ones(1), "bo": ones(2)}
    micro_batches.backward(Backward(0, (ADA, BO)), gradients)
    micro_batches.end()
    tally = micro_batches.take_tally()
    assert (tally.forwards, tally.backwards, tally.dummy_micro_batches, tally.tokens) == (2, 2, 1, 5)
    assert tally.busy_seconds == 4.0 and micro_batches.service_seconds == 4.0
    assert {client for client, _ in outbox.sent} == {"ada", "bo"}
    assert micro_batches.take_tally().forwards == 0, "counted once"


def test_clients_divide_by_everybodys_masked_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(run={"windows": 1})
    rank = Rank(monkeypatch, config, [FakeClient(name, config) for name in ("ada", "bo", "cy")])
    rank.run()
    told = {message.hidden.masked_tokens for _, message in rank.endpoint.sent if message.HasField("hidden")}
    assert told == {3 * sum(length // 2 for length in (3, 5, 2, 4))}
