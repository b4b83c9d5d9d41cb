"""A message that is refused leaves no trace: queue and inbox are as before, and the right message
is still taken.
"""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from unit.server.fake_client import HALF, WIDTH
from unit.server.queue.federation import queue_state

from fedbert_ds.errors import WireError
from fedbert_ds.federation.client_update import update_chunks
from fedbert_ds.federation.update_exchange import UpdateExchange
from fedbert_ds.server.contract import Contract, TensorContract
from fedbert_ds.server.cursors import Cursors
from fedbert_ds.server.inbox import Inbox
from fedbert_ds.server.influence import Influence
from fedbert_ds.server.network.decoding import Decoded, decoded
from fedbert_ds.server.network.events import Received
from fedbert_ds.server.queue.deadlines import Question
from fedbert_ds.server.queue.decisions import Forward, Open, Plan
from fedbert_ds.server.queue.packing import Piece
from fedbert_ds.server.queue.pipeline_queue import PipelineQueue
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import encode, encode_positions
from fedbert_kernels.encoded import Encoded

CONTRACT = Contract(
    TensorContract("fp32", WIDTH, 8), TensorContract("fp32", WIDTH, 8), 8, False, {"table": HALF["table"]}, HALF
)


class FedInbox(Inbox):
    """An inbox with its queue and exchange in reach, fed with messages as they come from the
    endpoint.
    """

    queue: PipelineQueue
    exchange: UpdateExchange
    cursors: Cursors

    def take(self, client: str, message: pb.ClientMessage) -> bool:
        event = decoded(Received(client, message), CONTRACT)
        assert isinstance(event, Decoded)
        return self.receive(client, message, event.tensor, 0.0)


def one_micro_batch(_: Any) -> list[tuple[Piece, ...]]:
    return [(Piece("ada", 0, 2, 6, 2),)]


@pytest.fixture
def inbox() -> Any:
    """In window 0: micro-batch 0 is open for ada's two sequences, 6 tokens, 2 of them masked."""
    queue = PipelineQueue(1, one_micro_batch, num_windows=1)
    exchange = UpdateExchange(lambda updates, average: {"weights": [update.weight for update in updates.values()]})
    cursors = Cursors({})
    made = FedInbox(queue, exchange, cursors, CONTRACT, {"ada": 6}, Influence(10.0, None, print))
    made.queue, made.exchange, made.cursors = queue, exchange, cursors
    queue.join("ada", 0.0)
    made.take("ada", manifest())
    assert isinstance(queue.decide(0.0), Plan)
    queue.start(1, 0.0)
    made.begin()
    assert isinstance(queue.decide(0.0), Open)
    return made


CURSOR = {"epoch": 1, "position": 2, "sequences": 7}
"""After window 0."""


def manifest(**cursor: int) -> pb.ClientMessage:
    fields = pb.Manifest(window=0, lengths=[4, 2], masked=[1, 1], cursor=pb.Cursor(**(CURSOR | cursor)))
    return pb.ClientMessage(manifest=fields)


def kept_by(inbox: Any) -> Any:
    """All that an inbox holds, in words."""
    return {name: repr(value) for name, value in vars(inbox).items()}


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
    before = queue_state(inbox.queue)
    kept = kept_by(inbox)
    with pytest.raises(WireError, match=r"^client ada"):
        inbox.take("ada", message)
    assert queue_state(inbox.queue) == before
    assert kept_by(inbox) == kept


def bad_frame(rows: int, value: float) -> pb.TensorFrame:
    frame = encode(torch.ones(rows, WIDTH), "fp32")
    frame.payload = torch.full((rows, WIDTH), value).numpy().tobytes()
    return frame


@pytest.mark.parametrize(
    "changes",
    [
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
    inbox.take("ada", activations())
    arrived = inbox.take_activations(0, "ada")
    assert arrived.masked_positions.tolist() == [1, 4] and torch.equal(arrived.values.decode(), torch.ones(6, WIDTH))
    refused(inbox, activations())


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch": 1},
        {"loss_sum": math.nan},
        {"loss_sum": -0.5},
        {"loss_sum": 1.7e308},
        {"loss_sum": 2.1e4},  # ten thousand nats for each of two masked tokens, and some
        {"hidden": encode(torch.ones(6, WIDTH), "fp32")},
        {"hidden": bad_frame(2, -math.inf)},
        {"hidden": bad_frame(2, -1e9)},
    ],
    ids=str,
)
def test_gradients_that_are_refused_leave_no_trace(inbox: Any, changes: dict[str, Any]) -> None:
    inbox.take("ada", activations())
    assert isinstance(inbox.queue.decide(0.0), Forward)
    refused(inbox, gradient(**changes))
    assert (inbox.loss_sum, inbox.masked_tokens) == (0.0, 0)
    inbox.take("ada", gradient())
    assert (inbox.loss_sum, inbox.masked_tokens) == (3.0, 2)
    assert torch.equal(inbox.take_gradient(0, "ada").decode(), torch.ones(2, WIDTH))


def test_a_tensor_is_taken_only_if_it_is_what_was_planned(inbox: Any) -> None:
    values, other = (Encoded.of(torch.full((rows, WIDTH), 2.0), "fp32") for rows in (6, 5))
    with pytest.raises(WireError, match="shape"):
        inbox.receive("ada", activations(values=encode(torch.ones(5, WIDTH), "fp32")), other, 0.0)
    with pytest.raises(WireError, match="not finite"):
        inbox.receive("ada", activations(), WireError("client ada: a value is not finite"), 0.0)
    inbox.receive("ada", activations(), values, 0.0)
    assert inbox.take_activations(0, "ada").values is values


def combined(inbox: Any) -> Any:
    """What the exchange makes of window 0."""
    deadline = time.monotonic() + 20.0
    while (result := inbox.exchange.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return result[1]


def test_a_half_is_taken_once_and_only_what_is_exchanged(inbox: Any) -> None:
    table, last = update_chunks(0, [("table", torch.ones(HALF["table"]))])
    inbox.exchange.expect(0, dict.fromkeys(["ada"], 1), True)
    with pytest.raises(WireError, match="'head'"):
        inbox.take("ada", pb.ClientMessage(update=pb.UpdateChunk(name="head", shape=[2])))
    inbox.drop("ada")
    inbox.take("ada", pb.ClientMessage(update=table))
    with pytest.raises(WireError, match="an update of window 1 inside that of window 0"):
        inbox.take("ada", pb.ClientMessage(update=pb.UpdateChunk(window=1, last=True)))
    inbox.take("ada", pb.ClientMessage(update=last))
    for chunk in update_chunks(0, [("table", torch.zeros(HALF["table"]))]):
        with pytest.raises(WireError, match="an update of window 0, which nobody asked for"):
            inbox.take("ada", pb.ClientMessage(update=chunk))
    assert combined(inbox) == {"weights": [1.0]}, "a second one is not looked at"


def test_a_whole_half_is_another_than_the_one_that_is_exchanged(inbox: Any) -> None:
    """With average_scope: embeddings fewer tensors are exchanged than handed over at the end."""
    inbox.expect_collected(1)
    whole = [("table", torch.ones(HALF["table"])), ("head", torch.ones(HALF["head"]))]
    for chunk in update_chunks(1, whole):
        inbox.take("ada", pb.ClientMessage(update=chunk))
    assert inbox.collected["ada"].keys() == HALF.keys()
    with pytest.raises(WireError, match="a second client model of window 1"):
        inbox.take("ada", pb.ClientMessage(update=pb.UpdateChunk(window=1, last=True)))
    inbox.exchange.expect(2, dict.fromkeys(["ada"], 1), True)
    with pytest.raises(WireError, match="'head'"):
        inbox.take("ada", pb.ClientMessage(update=next(update_chunks(2, whole[1:]))))


def test_of_a_window_that_went_on_without_a_client_one_update_may_come(inbox: Any) -> None:
    """It was on its way; nothing is made of it, and of no other window anything is taken."""
    chunks = [pb.ClientMessage(update=chunk) for chunk in update_chunks(3, [("table", torch.ones(3, WIDTH))])]
    inbox.leave_out("ada", [2, 3, 5])
    for client, window in (("ada", 4), ("bo", 3)):
        with pytest.raises(WireError, match=f"client {client}: an update of window {window}, which nobody asked for"):
            inbox.take(client, pb.ClientMessage(update=pb.UpdateChunk(window=window)))
    for chunk in chunks:
        inbox.take("ada", chunk)
    assert inbox.exchange.is_idle
    for window in (2, 3):
        with pytest.raises(WireError, match="which nobody asked for"):
            inbox.take("ada", pb.ClientMessage(update=pb.UpdateChunk(window=window)))
    inbox.take("ada", pb.ClientMessage(update=pb.UpdateChunk(window=5, name="table", shape=(3, WIDTH), payload=b"1")))
    inbox.drop("ada")
    with pytest.raises(WireError, match="which nobody asked for"):
        inbox.take("ada", pb.ClientMessage(update=pb.UpdateChunk(window=5)))


def test_a_trickle_of_an_update_buys_no_time(inbox: Any) -> None:
    """Bytes do, at 16 kB/s."""
    inbox.exchange.expect(0, dict.fromkeys(["ada"], 1), True)
    deadlines, question = inbox.queue.deadlines, Question("update", 0)
    deadlines.close_all("ada")
    deadlines.silence_timeout = 30.0
    deadlines.ask("ada", question, 0.0)
    for second in range(40):
        payload = pb.UpdateChunk(window=0, name="table", shape=(3, WIDTH), offset=second, payload=b"1")
        inbox.receive("ada", pb.ClientMessage(update=payload), None, float(second))
        assert (deadlines.late(float(second)) is None) == (second <= 30)


@pytest.mark.parametrize("saved", [pb.Saved(window=2), pb.Saved(window=3, flops_per_token=math.nan)])
def test_a_state_nobody_asked_for_is_not_counted(inbox: Any, saved: pb.Saved) -> None:
    inbox.expect_saved(3)
    refused(inbox, pb.ClientMessage(saved=saved))
    inbox.take("ada", pb.ClientMessage(saved=pb.Saved(window=3)))
    refused(inbox, pb.ClientMessage(saved=pb.Saved(window=3)))
    assert inbox.saved == {"ada": pb.Saved(window=3)}


def test_what_is_lost_is_forgotten_but_for_gradients_in_time(inbox: Any) -> None:
    inbox.take("ada", activations())
    inbox.queue.decide(0.0)
    inbox.take("ada", gradient())
    inbox.drop("ada")
    with pytest.raises(KeyError):
        inbox.take_activations(0, "ada")
    assert torch.equal(inbox.take_gradient(0, "ada").decode(), torch.ones(2, WIDTH))


def test_late_answers_of_a_skipped_piece_are_ignored(inbox: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox.take("ada", activations())
    inbox.drop_activations("ada")
    with pytest.raises(KeyError):
        inbox.take_activations(0, "ada")
    monkeypatch.setattr(inbox.queue, "take_skipped", lambda client, micro_batch: (client, micro_batch) == ("ada", 0))
    assert inbox.take("ada", activations()) and inbox.take("ada", gradient())
    assert inbox.is_empty
    with pytest.raises(WireError, match="nobody asked for"):
        inbox.take("ada", activations(micro_batch=1))


def test_a_manifest_that_comes_too_late_is_told_apart(inbox: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox.queue, "manifest", lambda manifest: False)
    assert inbox.take("ada", manifest()) is False


# -- cursors and roll-backs ------------------------------------------------------------------------


def test_a_manifest_says_where_its_clients_text_goes_on(inbox: Any) -> None:
    assert inbox.cursors.committed == {}, "window 0 is not trained"
    inbox.cursors.commit(0)
    assert inbox.cursors.committed == {"ada": CURSOR}


def test_a_manifest_that_is_refused_moves_no_cursor(inbox: Any) -> None:
    refused(inbox, manifest(position=8))
    refused(inbox, manifest(epoch=5))  # a second one
    inbox.cursors.commit(0)
    assert inbox.cursors.committed == {"ada": CURSOR}


def test_after_a_roll_back_nothing_that_came_is_left(inbox: Any) -> None:
    empty = kept_by(inbox)
    inbox.take("ada", activations())
    assert isinstance(inbox.queue.decide(0.0), Forward)
    inbox.take("ada", gradient())
    inbox.exchange.expect(0, dict.fromkeys(["ada"], 1), True)
    first, *_ = update_chunks(0, [("table", torch.ones(HALF["table"]))])
    inbox.take("ada", pb.ClientMessage(update=first))
    assert not inbox.is_empty
    inbox.roll_back()
    assert inbox.is_empty and (inbox.loss_sum, inbox.masked_tokens) == (0.0, 0)
    kept = kept_by(inbox)
    for books in (empty, kept):  # what was received was received
        for place in ("queue", "_queue", "exchange", "_exchange", "update_bytes", "reports"):
            del books[place]
    assert kept == empty
