"""A message that is refused leaves no trace: queue and inbox are as before, and the right message is still taken."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from unit.server.fakes import HALF, WIDTH

from fedbert_ds.config import WireSection
from fedbert_ds.errors import WireError
from fedbert_ds.server.coordinator import Seat
from fedbert_ds.server.inbox import Inbox, Shapes
from fedbert_ds.server.pipeline_queue import Forward, Open, PipelineQueue
from fedbert_ds.server.window import MicroBatch, Piece
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import encode, encode_positions
from fedbert_ds.wire.messages import half_chunks


@pytest.fixture
def inbox() -> Any:
    """In window 0: micro-batch 0 is open for ada's two sequences, 6 tokens, 2 of them masked."""
    queue = PipelineQueue(1)
    shapes = Shapes(WIDTH, WIDTH, 8, False, HALF, frozenset({"table"}))
    made: Any = Inbox(queue, shapes, WireSection(), {"ada": Seat(0, "s", 6)})
    made.queue = queue
    queue.join("ada", 0.0)
    made.receive("ada", pb.ClientMessage(manifest=pb.Manifest(window=0, lengths=[4, 2], masked=[1, 1])))
    queue.start(0, [MicroBatch(0, (Piece("ada", 0, 2, 6, 2),))])
    made.begin(0)
    assert isinstance(queue.decide(0.0), Open)
    return made


def positions(*masked: int) -> bytes:
    return encode_positions(torch.tensor(masked), 6)


def activations(**changes: Any) -> pb.ClientMessage:
    fields: dict[str, Any] = {
        "window": 0, "micro_batch": 0, "masked_positions": positions(1, 4),
        "values": encode(torch.ones(6, WIDTH), "fp32"),
    }  # fmt: skip
    return pb.ClientMessage(activations=pb.Activations(**(fields | changes)))


def gradient(**changes: Any) -> pb.ClientMessage:
    fields: dict[str, Any] = {
        "window": 0, "micro_batch": 0, "loss_sum": 3.0, "hidden": encode(torch.ones(2, WIDTH), "fp32")
    }  # fmt: skip
    return pb.ClientMessage(gradient=pb.Gradient(**(fields | changes)))


def refused(inbox: Any, message: pb.ClientMessage) -> None:
    before = copy.deepcopy(vars(inbox.queue))
    kept = copy.deepcopy({name: value for name, value in vars(inbox).items() if name not in ("queue", "_queue")})
    with pytest.raises(WireError, match=r"^client ada"):
        inbox.receive("ada", message)
    assert vars(inbox.queue) == before
    for name, value in kept.items():
        assert repr(getattr(inbox, name)) == repr(value), name


def bad_frame(rows: int, value: float) -> pb.TensorFrame:
    frame = encode(torch.ones(rows, WIDTH), "fp32")
    frame.payload = torch.full((rows, WIDTH), value).numpy().tobytes()
    return frame


@pytest.mark.parametrize(
    "changes",
    [
        {"window": 1},
        {"micro_batch": 1},
        {"masked_positions": positions(1)},
        {"masked_positions": positions(1, 4) + bytes(1)},
        {"masked_positions": positions(1, 2, 4)},
        {"values": encode(torch.ones(5, WIDTH), "fp32")},
        {"values": encode(torch.ones(6, WIDTH), "bf16")},
        {"values": bad_frame(6, math.nan)},
        {"values": bad_frame(6, 1e9)},
        {"values": pb.TensorFrame()},
    ],
    ids=str,
)
def test_activations_that_are_refused_leave_no_trace(inbox: Any, changes: dict[str, Any]) -> None:
    refused(inbox, activations(**changes))
    refused(inbox, gradient())
    inbox.receive("ada", activations())
    arrived = inbox.take_activations(0, "ada")
    assert arrived.masked_positions.tolist() == [1, 4] and torch.equal(arrived.values, torch.ones(6, WIDTH))
    refused(inbox, activations())


@pytest.mark.parametrize(
    "changes",
    [
        {"window": 1},
        {"micro_batch": 1},
        {"loss_sum": math.nan},
        {"loss_sum": -0.5},
        {"hidden": encode(torch.ones(6, WIDTH), "fp32")},
        {"hidden": bad_frame(2, -math.inf)},
        {"hidden": bad_frame(2, -1e9)},
    ],
    ids=str,
)
def test_gradients_that_are_refused_leave_no_trace(inbox: Any, changes: dict[str, Any]) -> None:
    inbox.receive("ada", activations())
    assert isinstance(inbox.queue.decide(0.0), Forward)
    refused(inbox, gradient(**changes))
    assert (inbox.loss_sum, inbox.masked_tokens) == (0.0, 0)
    inbox.receive("ada", gradient())
    assert (inbox.loss_sum, inbox.masked_tokens) == (3.0, 2)
    assert torch.equal(inbox.take_gradient(0, "ada"), torch.ones(2, WIDTH))


def test_a_half_is_taken_once_and_only_what_is_exchanged(inbox: Any) -> None:
    table, rest = (
        list(half_chunks(0, [("table", torch.ones(HALF["table"]))], 5.0)),
        pb.HalfChunk(name="head", shape=[2]),
    )
    with pytest.raises(WireError, match="'head'"):
        inbox.receive("ada", pb.ClientMessage(half=rest))
    for chunk in table:
        inbox.receive("ada", pb.ClientMessage(half=chunk))
    tensors, weight = inbox.halves["ada"]
    assert tensors.keys() == {"table"} and weight == 5.0
    with pytest.raises(WireError, match="a second half"):
        inbox.receive("ada", pb.ClientMessage(half=table[0]))
    inbox.begin(1)
    assert not inbox.halves
    inbox.receive("ada", pb.ClientMessage(half=table[0]))


def test_a_transfer_begun_for_another_purpose_is_not_completed(inbox: Any) -> None:
    """With average_scope: embeddings fewer tensors are exchanged than are handed over at the end."""
    table, last = half_chunks(0, [("table", torch.ones(HALF["table"]))], 5.0)
    inbox.receive("ada", pb.ClientMessage(half=table))
    inbox.expect_halves(frozenset(HALF))
    with pytest.raises(WireError, match="did not arrive whole"):
        inbox.receive("ada", pb.ClientMessage(half=last))


@pytest.mark.parametrize("saved", [pb.Saved(window=2), pb.Saved(window=3, flops_per_token=math.nan)])
def test_a_state_nobody_asked_for_is_not_counted(inbox: Any, saved: pb.Saved) -> None:
    inbox.expect_saved(3)
    refused(inbox, pb.ClientMessage(saved=saved))
    inbox.receive("ada", pb.ClientMessage(saved=pb.Saved(window=3)))
    refused(inbox, pb.ClientMessage(saved=pb.Saved(window=3)))
    assert inbox.saved == {"ada": pb.Saved(window=3)}


def test_what_is_lost_is_forgotten_but_for_gradients_in_time(inbox: Any) -> None:
    inbox.receive("ada", activations())
    inbox.queue.decide(0.0)
    inbox.receive("ada", gradient())
    inbox.drop("ada")
    with pytest.raises(KeyError):
        inbox.take_activations(0, "ada")
    assert torch.equal(inbox.take_gradient(0, "ada"), torch.ones(2, WIDTH))
