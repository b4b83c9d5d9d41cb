"""Averaged changes: clients stay equal, fp32 is an average of weights, rounding errors are sent
later.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedbert_ds.federation.averaging import combine
from fedbert_ds.federation.client_update import ClientUpdate, Tensors, UpdateAssembler, update_chunks
from fedbert_ds.federation.shared_weights import SharedWeights

SHAPES = {"table": (6, 70), "bias": (5,)}


def weights(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}


def received(chunks, codec: str) -> Tensors:
    joined = UpdateAssembler(SHAPES, "it", codec)
    for chunk in chunks:
        complete = joined.add(chunk)
    assert complete is not None
    return complete


def averaged(clients: list[SharedWeights], now: list[dict[str, Tensor]], codec: str) -> list[dict[str, Tensor]]:
    """One exchange through the server, as the wire carries it."""
    updates = [
        ClientUpdate(received(client.changes(3, own), codec), 1.0 + place)
        for place, (client, own) in enumerate(zip(clients, now, strict=True))
    ]
    combined = combine(updates, SHAPES, average=True, group=None)
    down = received(update_chunks(3, combined.items(), codec), codec)
    return [dict(client.apply(down)) for client in clients]


def test_exact_changes_average_as_weights_do() -> None:
    clients = [SharedWeights(SHAPES, "fp32") for _ in range(2)]
    for client in clients:
        client.begin(weights(0))
    now = [weights(1), weights(2)]
    for result in averaged(clients, now, "fp32"):
        for name in SHAPES:
            torch.testing.assert_close(result[name], (now[0][name] + 2.0 * now[1][name]) / 3.0)


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4_hadamard"])
def test_clients_stay_equal_and_near(codec: str) -> None:
    clients = [SharedWeights(SHAPES, codec) for _ in range(2)]
    for client in clients:
        client.begin(weights(0))
    own = weights(0)
    for _ in range(3):
        now = [{name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in own.items()} for _ in clients]
        first, second = averaged(clients, now, codec)
        for name in SHAPES:
            assert torch.equal(first[name], second[name])
            wanted = (now[0][name] + 2.0 * now[1][name]) / 3.0
            assert (first[name] - wanted).abs().max() < 0.02, "a fraction of the change, not of the weight"
        own = first


@pytest.mark.parametrize("codec", ["int4_hadamard", "int2_hadamard"])
def test_what_rounding_takes_is_sent_with_the_next_changes(codec: str) -> None:
    """Up alone: a change sent again and again arrives to a few roundings of it; without feedback it
    would drift.
    """
    steps, roundings = 30, {"int4_hadamard": 2.0, "int2_hadamard": 4.0}[codec]
    client = SharedWeights(SHAPES, codec)
    client.begin(weights(0))
    change = {name: 0.1 * tensor for name, tensor in weights(1).items()}
    still = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    arrived = torch.zeros(SHAPES["table"])
    one = None
    for step in range(steps):
        common = dict(client.apply(still))
        got = received(client.changes(step, {n: common[n] + change[n] for n in SHAPES}), codec)
        arrived += got["table"]
        one = got["table"] if one is None else one
    error = (arrived - steps * change["table"]).abs().max()
    alone = (one - change["table"]).abs().max()
    assert 0.0 < error <= roundings * alone < steps * alone / 5.0


def test_a_checkpoint_goes_on_as_if_there_had_been_none() -> None:
    client = SharedWeights(SHAPES, "int8")
    client.begin(weights(0))
    list(client.changes(0, weights(1)))
    copy = SharedWeights(SHAPES, "int8")
    copy.load_state_dict(client.state_dict())
    assert [c.SerializeToString() for c in client.changes(1, weights(2))] == [
        c.SerializeToString() for c in copy.changes(1, weights(2))
    ]
