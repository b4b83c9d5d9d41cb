"""The body's work: what is counted of each model, and that it needs no weights later."""

from __future__ import annotations

import pytest
import torch

from fedbert_ds.config import LayersCut
from fedbert_ds.model.cut import split
from fedbert_ds.model.flops import BodyWork


def test_a_gated_layer_is_counted_from_its_matrices(small_model) -> None:
    _, body = split(small_model("modernbert"), LayersCut(layers=1))
    # Of 16 x 16: q, k and v, and their output; of the gate's 16 x 48 and back 24 x 16, the last
    # layer's for masked positions only.
    attention, feed_forward = 4 * 16 * 16, 16 * 48 + 24 * 16
    assert body.work == BodyWork(2 * attention + feed_forward, feed_forward, 16, (2, None))


def test_the_work_outlives_the_weights(small_model, architecture) -> None:
    """ZeRO stage 3 leaves parameters without entries."""
    _, body = split(small_model(architecture), "embeddings")
    work, expected = body.work, body.flops_per_token(0.15, 10)
    for parameter in body.parameters():
        parameter.data = torch.empty(0)
    assert work.flops_per_token(0.15, 10) == expected > body.flops_per_token(0.15, 10)


@pytest.mark.parametrize("mask_share", [0.0, 0.15, 1.0])
def test_more_masked_positions_and_longer_sequences_cost_more(small_model, architecture, mask_share: float) -> None:
    _, body = split(small_model(architecture), "embeddings")
    costs = [body.flops_per_token(mask_share, length) for length in (1, 2, 5, 40)]
    assert costs == sorted(set(costs))
    assert body.flops_per_token(mask_share + 0.1, 5) > body.flops_per_token(mask_share, 5)
