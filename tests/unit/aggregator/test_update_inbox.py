"""Nothing but whole, well-formed updates passes to the aggregator."""

from __future__ import annotations

import pytest
import torch

from fedbert_ds.aggregator.update_inbox import UpdateInbox
from fedbert_ds.errors import WireError
from fedbert_ds.federation.client_update import update_chunks
from fedbert_ds.wire import fedbert_pb2 as pb

TABLE, BIAS = torch.arange(6.0).view(3, 2) + 1, torch.ones(2)


def inbox() -> UpdateInbox:
    return UpdateInbox({"table": (3, 2)}, {"table": (3, 2), "bias": (2,)}, "fp32")


def messages(window: int, **tensors: torch.Tensor) -> list[pb.ClientMessage]:
    return [pb.ClientMessage(update=chunk) for chunk in update_chunks(window, tensors.items())]


def test_an_update_is_whole_with_its_last_chunk() -> None:
    here = inbox()
    first, last = messages(5, table=TABLE)
    arrived = here.receive("ada", first)
    assert (arrived.window, arrived.is_model, arrived.decode) == (5, False, None)
    arrived = here.receive("ada", last)
    assert arrived.decode is not None
    assert torch.equal(arrived.decode()["table"], TABLE)


def test_whole_client_models_are_taken_when_they_are_collected() -> None:
    here = inbox()
    whole = messages(6, table=TABLE, bias=BIAS)
    with pytest.raises(WireError, match=r"'bias' .* was not expected"):
        for message in whole:
            here.receive("ada", message)
    here.collect(6)
    for message in whole:
        arrived = here.receive("bo", message)
    assert arrived.is_model and arrived.decode is not None and torch.equal(arrived.decode()["bias"], BIAS)


@pytest.mark.parametrize(
    "message",
    [
        pb.ClientMessage(activations=pb.Activations(window=1)),
        pb.ClientMessage(gradient=pb.Gradient(window=1)),
        pb.ClientMessage(manifest=pb.Manifest(window=1, lengths=[3])),
        pb.ClientMessage(),
    ],
)
def test_what_is_the_servers_is_refused(message: pb.ClientMessage) -> None:
    with pytest.raises(WireError, match=r"client ada: a message of kind .* belongs to the server"):
        inbox().receive("ada", message)


def test_updates_do_not_mix() -> None:
    here = inbox()
    here.receive("ada", messages(1, table=TABLE)[0])
    with pytest.raises(WireError, match="window 2 inside that of window 1"):
        here.receive("ada", messages(2, table=TABLE)[0])
    here.drop("ada")
    assert here.receive("ada", messages(2, table=TABLE)[0]).window == 2
