"""What is typical before a client is heard is near what the first window of honest clients has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedbert_ds.config import ModelSection
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.model.cut import split
from fedbert_ds.server.first_sizes import first_sizes
from fedbert_kernels.encoded import Encoded

SMALL = ModelSection(hidden_size=32, num_attention_heads=4, num_hidden_layers=3, max_position_embeddings=40)


def half_of(cut: Any, seed: int = 1) -> ClientHalf:
    half, _ = split(build_model(SMALL, 300, 0, seed), cut)
    return half


@pytest.mark.parametrize("cut", ["embeddings", "rows", {"layers": 1}], ids=str)
@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_half_of_other_weights_and_other_words_has_about_the_same(cut: Any, codec: str) -> None:
    from fedbert_ds.config import LayersCut

    cut = LayersCut(**cut) if isinstance(cut, dict) else cut
    sizes = first_sizes(half_of(cut), codec, 32, seed=3)
    other = half_of(cut, seed=2).eval()
    words = torch.randint(300, (40,), generator=torch.Generator().manual_seed(8))
    real = Encoded.of(other.embed(words, [32, 8]).values.detach(), codec).row_sizes
    assert sizes.row == pytest.approx(float(real.square().mean().sqrt()), rel=0.3)
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(9))
    _, gradient = other.head_backward(hidden, words[:20], 1.0)
    assert sizes.token == pytest.approx(float(gradient.norm() / 20**0.5), rel=0.5)


def test_nothing_changes_and_no_random_number_is_used_up() -> None:
    half = half_of("embeddings").train()
    weights = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first_sizes(half, "fp32", 32, seed=3)
    assert torch.equal(torch.rand(3), expected) and half.training
    assert all(parameter.grad is None for parameter in half.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in half.state_dict().items())
