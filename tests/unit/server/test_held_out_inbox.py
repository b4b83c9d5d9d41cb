"""Held-out text's activations and losses: counted once, checked before they meet the body."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedbert_ds.errors import WireError
from fedbert_ds.server.contract import Contract, TensorContract
from fedbert_ds.server.held_out_inbox import HeldOutInbox
from fedbert_ds.telemetry.evaluations import HeldOutLoss
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import encode, encode_positions, encode_row_index, from_frame
from fedbert_kernels.encoded import Encoded

WIDTH = 4


def inbox_of(is_rows_cut: bool = False, num_counts: int = 0) -> HeldOutInbox:
    form = TensorContract("fp32", WIDTH, 10)
    inbox = HeldOutInbox(Contract(form, form, 6, is_rows_cut, {}, {}, num_counts=num_counts))
    inbox.begin(3)
    inbox.expect("ada")
    return inbox


def activations(lengths: list[int], rows: int | None = None, **changes: Any) -> tuple[pb.Activations, Encoded]:
    values = encode(torch.ones(sum(lengths) if rows is None else rows, WIDTH), "fp32")
    positions = encode_positions(torch.arange(sum(lengths) // 2), sum(lengths))
    fields = {"window": 3, "micro_batch": 7, "values": values, "masked_positions": positions}
    message = pb.Activations(**(fields | {"held_out_lengths": lengths} | changes))
    return message, from_frame(values, tuple(values.shape), "fp32", "it")


def loss(**changes: Any) -> pb.Evaluated:
    return pb.Evaluated(**({"window": 3, "loss_sum": 2.5, "masked_tokens": 2} | changes))


def test_a_part_is_taken_once_as_the_body_takes_it() -> None:
    inbox = inbox_of()
    inbox.receive_activations("ada", *activations([4, 3]))
    part = inbox.take_part()
    assert part is not None and (part.client, part.number) == ("ada", 7) and inbox.take_part() is None
    assert part.body_input.cu_seqlens.tolist() == [0, 4, 7]
    assert part.body_input.masked_positions.tolist() == [0, 1, 2]


def test_with_cut_rows_each_token_has_its_row() -> None:
    inbox = inbox_of(is_rows_cut=True)
    message, tensor = activations([3], rows=2, row_index=encode_row_index(torch.tensor([0, 1, 0]), 2))
    inbox.receive_activations("ada", message, tensor)
    part = inbox.take_part()
    assert part is not None and part.body_input.row_index is not None
    assert part.body_input.row_index.tolist() == [0, 1, 0]
    with pytest.raises(WireError, match="4 rows for 3 tokens"):
        inbox.receive_activations("ada", *activations([3], rows=4))


def test_losses_add_up_until_the_last_part() -> None:
    inbox = inbox_of()
    assert not inbox.receive_loss("ada", loss())
    assert inbox.losses == {} and inbox.awaited == {"ada"}
    assert inbox.receive_loss("ada", loss(loss_sum=1.0, masked_tokens=1, last=True))
    assert inbox.losses == {"ada": HeldOutLoss(3.5, 3)} and not inbox.awaited
    with pytest.raises(WireError, match="not asked for"):
        inbox.receive_loss("ada", loss())


def test_of_one_that_is_gone_nothing_is_left_but_what_it_reported_to_the_end() -> None:
    inbox = inbox_of()
    inbox.expect("bo")
    inbox.receive_activations("bo", *activations([4]))
    inbox.receive_activations("ada", *activations([4]))
    inbox.receive_loss("bo", loss())
    inbox.drop("bo")
    part = inbox.take_part()
    assert part is not None and part.client == "ada" and inbox.take_part() is None
    assert inbox.awaited == {"ada"} and inbox.losses == {}
    inbox.receive_loss("ada", loss(last=True))
    inbox.drop("ada")
    assert inbox.losses == {"ada": HeldOutLoss(2.5, 2)}
    inbox.begin(4)
    assert inbox.losses == {}


@pytest.mark.parametrize(
    ("lengths", "changes", "what"),
    [
        ([4], {"window": 2}, "not asked for"),
        ([7], {}, "sequences of 7 to 7 tokens"),
        ([6, 6], {}, "12 together"),
        ([4], {"held_out_lengths": [4, 0]}, "sequences of 0"),
        ([4], {"held_out_lengths": [5]}, "instead of .5, 4."),
        ([4], {"masked_positions": b""}, "0 bytes of masked positions instead of 1"),
    ],
)
def test_activations_that_do_not_fit_are_refused(lengths: list[int], changes: Any, what: str) -> None:
    inbox = inbox_of()
    with pytest.raises(WireError, match=what):
        inbox.receive_activations("ada", *activations(lengths, **changes))
    assert inbox.take_part() is None


def test_a_tensor_that_could_not_be_decoded_is_refused() -> None:
    message, _ = activations([4])
    with pytest.raises(WireError, match="broken"):
        inbox_of().receive_activations("ada", message, WireError("broken"))


def test_its_bytes_are_counted_once() -> None:
    inbox = inbox_of()
    message, tensor = activations([4])
    inbox.receive_activations("ada", message, tensor)
    inbox.receive_loss("ada", loss())
    assert inbox.take_bytes() == message.ByteSize() + loss().ByteSize() and inbox.take_bytes() == 0


def test_no_more_than_two_parts_of_a_client_wait() -> None:
    inbox = inbox_of()
    for _ in range(2):
        inbox.receive_activations("ada", *activations([4]))
    with pytest.raises(WireError, match="2 others of it wait already"):
        inbox.receive_activations("ada", *activations([4]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_an_impossible_loss_is_refused(value: float) -> None:
    with pytest.raises(WireError, match="a loss of"):
        inbox_of().receive_loss("ada", loss(loss_sum=value))


def test_counts_of_a_task_add_up_over_parts() -> None:
    inbox = inbox_of(num_counts=2)
    inbox.receive_loss("ada", loss(counts=[1.0, 5.0]))
    inbox.receive_loss("ada", loss(counts=[2.0, 0.5], last=True))
    assert inbox.losses["ada"].counts == (3.0, 5.5)
    inbox.begin(3)
    inbox.expect("ada")
    inbox.receive_loss("ada", pb.Evaluated(window=3, last=True))
    assert inbox.losses["ada"].counts == (0.0, 0.0), "one that holds nothing out has counted nothing"


@pytest.mark.parametrize("counts", [[], [1.0], [1.0, 2.0, 3.0], [1.0, math.nan], [math.inf, 0.0]])
def test_counts_that_are_not_the_tasks_are_refused(counts: list[float]) -> None:
    inbox = inbox_of(num_counts=2)
    with pytest.raises(WireError, match=f"{len(counts)} counts instead of 2 numbers"):
        inbox.receive_loss("ada", loss(counts=counts))
    assert inbox.losses == {} and inbox.awaited == {"ada"}
