"""Encoders over packed tokens: positions for who wants them, and what leaves the last layer."""

from __future__ import annotations

import pytest
import torch
from unit.model.samples import pack

from fedbert_ds.model.architecture import layers_of
from fedbert_ds.model.attention import Packing
from fedbert_ds.model.cut import split
from fedbert_ds.model.encoder import encode, position_ids


def test_positions_restart_at_each_sequence(small_model) -> None:
    packing = Packing.from_lengths([3, 1, 2])
    expected = {"bert": [0, 1, 2, 0, 0, 1], "roberta": [2, 3, 4, 2, 2, 3], "electra": [0, 1, 2, 0, 0, 1]}
    for architecture, positions in expected.items():
        found = position_ids(small_model(architecture).config, packing)
        assert found["position_ids"].tolist() == [positions]
    assert position_ids(small_model("modernbert").config, packing) == {}


def test_masked_positions_alone_leave_the_last_layer(small_model, architecture) -> None:
    """And they leave it as they do where all positions go on."""
    model = small_model(architecture).eval()
    client, body = split(model, "embeddings")
    packed = pack([5, 3])
    packing = Packing.from_lengths(packed.lengths)
    base = body.base
    with torch.no_grad():
        hidden = client.embed(packed.input_ids, packed.lengths).values.unsqueeze(0)
        everything = encode(base, body.config, hidden, packing, torch.arange(8))
        found = encode(base, body.config, hidden, packing, torch.tensor([6, 0]))
    assert everything.shape == (1, 8, 16)
    torch.testing.assert_close(found, everything[:, [6, 0]], atol=1e-6, rtol=0)


@pytest.mark.parametrize("what", ["none", "elementwise", "layers"])
def test_layers_keep_their_names_and_weights(small_model, architecture, what) -> None:
    names = {name for name, _ in small_model(architecture).named_parameters()}
    client, body = split(small_model(architecture), "embeddings")
    body.recompute(what)
    assert {name for half in (client, body) for name, _ in half.named_parameters()} == names
    assert len(layers_of(body.base, body.config)) == 3
