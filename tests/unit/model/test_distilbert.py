"""DistilBERT's last layer: transformers' own, at masked positions alone."""

from __future__ import annotations

import copy

import torch
from transformers.models.distilbert.modeling_distilbert import TransformerBlock

from fedbert_ds.model.attention import PACKED_ATTENTION, Packing
from fedbert_ds.model.distilbert import LastLayer


def test_masked_positions_leave_it_as_they_leave_transformers_layer(small_model) -> None:
    model = small_model("distilbert", initializer_range=0.3).eval()
    model.config._attn_implementation = PACKED_ATTENTION
    layer = model.distilbert.transformer.layer[-1]
    assert type(layer) is TransformerBlock
    last = copy.deepcopy(layer)
    last.__class__ = LastLayer
    assert last.state_dict().keys() == layer.state_dict().keys()
    hidden, positions = torch.randn(1, 9, 16), torch.tensor([7, 0, 4])
    keywords = {"packing": Packing.from_lengths([5, 4]), "masked_positions": positions}
    with torch.no_grad():
        torch.testing.assert_close(last(hidden, **keywords), layer(hidden, **keywords)[:, positions])
