"""Parts of a window: every sequence once, within the bound; their gradients are the window's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.client.one_client import WIDTH

from fedbert_ds.client.whole_window import parts_of, train_window
from fedbert_ds.config import ModelSection
from fedbert_ds.data.masking import Batch
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.model.cut import undivided

VOCABULARY = 23
CPU = torch.device("cpu")


def whole_half(dropout: float = 0.0) -> ClientHalf:
    section = ModelSection(
        num_hidden_layers=2, hidden_size=WIDTH, num_attention_heads=2, max_position_embeddings=8, dropout=dropout
    )
    return undivided(build_model(section, VOCABULARY, 0, seed=5)).train()


def batch_of(lengths: list[int], share: float = 0.5, seed: int = 0) -> Batch:
    random = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    positions = (torch.rand(tokens, generator=random) < share).nonzero().flatten()
    labels = torch.randint(VOCABULARY, (len(positions),), generator=random)
    kinds = torch.randint(2, (tokens,), generator=random)
    return Batch(torch.randint(3, VOCABULARY, (tokens,), generator=random), lengths, positions, labels, kinds)


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), capacity=st.integers(1, 30),
       seed=st.integers(0, 2**31))  # fmt: skip
def test_every_sequence_is_in_one_part_in_order_within_the_bound(lengths, capacity, seed) -> None:
    batch = batch_of(lengths, seed=seed)
    parts = list(parts_of(batch, capacity))
    assert [length for _, part in parts for length in part.lengths] == lengths
    assert torch.cat([part.input_ids for _, part in parts]).equal(batch.input_ids)
    assert torch.cat([part.labels for _, part in parts]).equal(batch.labels)
    kinds = [part.token_types for _, part in parts if part.token_types is not None]
    assert batch.token_types is not None and torch.cat(kinds).equal(batch.token_types)
    place = token = 0
    for first, part in parts:
        assert first == place and part.lengths
        assert sum(part.lengths) <= capacity or len(part.lengths) == 1
        inside = batch.masked_positions[(batch.masked_positions >= token)]
        inside = inside[inside < token + sum(part.lengths)] - token
        assert part.masked_positions.equal(inside)
        place, token = place + len(part.lengths), token + sum(part.lengths)
    # No part could have taken the first sequence of the next one.
    for (_, part), (_, following) in itertools.pairwise(parts):
        assert sum(part.lengths) + following.lengths[0] > capacity


@pytest.mark.parametrize("capacity", [1, 9, 100])
def test_gradients_of_the_parts_add_up_to_those_of_the_window_s_mean(capacity: int) -> None:
    batch = batch_of([4, 6, 3, 5])
    expected, half = whole_half(), whole_half()
    loss = expected.whole_backward(batch.input_ids, batch.lengths, batch.masked_positions, batch.labels,
                                   1 / len(batch.labels), batch.token_types)  # fmt: skip
    losses = list(train_window(half, batch, capacity, ("seed",), CPU))
    assert sum(part.loss_sum for part in losses) == pytest.approx(loss, rel=1e-5)
    assert sum(part.masked_tokens for part in losses) == len(batch.labels)
    assert [part.is_last for part in losses] == [False] * (len(losses) - 1) + [True]
    assert len(losses) == {1: 4, 9: 3, 100: 1}[capacity]
    for (name, mine), theirs in zip(half.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_dropout_follows_from_the_seed_alone() -> None:
    batch = batch_of([4, 6, 3, 5])

    def losses(*seed: Any) -> list[float]:
        return [part.loss_sum for part in train_window(whole_half(dropout=0.5), batch, 9, seed, CPU)]

    torch.rand(7)
    assert losses("run", 1) == losses("run", 1) != losses("run", 2)


def test_a_window_without_masked_tokens_gives_no_gradient() -> None:
    half = whole_half()
    losses = list(train_window(half, batch_of([4, 2], share=0.0), 5, (), CPU))
    assert [part.loss_sum for part in losses] == [0.0, 0.0] and not any(part.masked_tokens for part in losses)
    assert not any(p.grad is not None and p.grad.any() for p in half.parameters())
