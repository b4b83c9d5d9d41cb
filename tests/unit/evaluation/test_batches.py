"""Batches hold every sequence once, no or little padding, and no more tokens than asked."""

from __future__ import annotations

import itertools
import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.evaluation.batches import LIKE, MaskedText, packed_batches, padded_batches


@given(st.lists(st.integers(1, 128), min_size=1, max_size=200), st.integers(1, 40))
def test_every_sequence_is_in_one_batch_within_the_bound(lengths: list[int], batch_size: int) -> None:
    sizes = torch.tensor(lengths)
    batches = padded_batches(sizes.argsort(stable=True), sizes, batch_size)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    padded = [len(batch) * max(lengths[number] for number in batch) for batch in batches]
    assert max(padded) <= batch_size * max(lengths)
    # None could be joined with the next: its first would not have fitted.
    for batch, following in itertools.pairwise(batches):
        longest = lengths[following[0]]
        assert (len(batch) + 1) * longest > batch_size * max(lengths) or lengths[batch[0]] < LIKE * longest
    assert all(min(of) >= LIKE * max(of) for batch in batches for of in [[lengths[number] for number in batch]])


@given(st.lists(st.integers(1, 128), min_size=1, max_size=200), st.integers(1, 40), st.randoms())
def test_packed_batches_hold_every_sequence_in_order_and_are_full(
    lengths: list[int], batch_size: int, rng: random.Random
) -> None:
    chosen = rng.sample(range(len(lengths)), rng.randint(1, len(lengths)))
    batches = packed_batches(torch.tensor(chosen), torch.tensor(lengths), batch_size)
    assert [number for batch in batches for number in batch] == chosen
    most = batch_size * max(lengths[number] for number in chosen)
    tokens = [sum(lengths[number] for number in batch) for batch in batches]
    assert max(tokens) <= most
    assert all(held + lengths[following[0]] > most for held, following in zip(tokens[:-1], batches[1:], strict=True))


def test_of_many_sequences_little_is_padding() -> None:
    sizes = torch.randint(4, 129, (5000,), generator=torch.Generator().manual_seed(1))
    batches = padded_batches(sizes.argsort(stable=True), sizes, 32)
    padded = sum(len(batch) * int(sizes[batch].max()) for batch in batches)
    assert int(sizes.sum()) / padded > 0.95
    assert len(batches) < 0.7 * len(sizes) / 32, "short ones make larger batches"


def test_a_batch_is_padded_where_its_sequences_end() -> None:
    text = MaskedText(torch.arange(1, 6), torch.tensor([-1, 7, -1, -1, 8]), torch.tensor([0, 2, 5]))
    ids, attention, targets = text.padded([0, 1], padding=99)
    assert ids.tolist() == [[1, 2, 99], [3, 4, 5]]
    assert attention.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert targets.tolist() == [[-1, 7, -1], [-1, -1, 8]]
    batch = text.packed([1, 0])
    assert batch.input_ids.tolist() == [3, 4, 5, 1, 2] and batch.lengths == [3, 2]
    assert batch.masked_positions.tolist() == [2, 4] and batch.labels.tolist() == [8, 7]
    assert text.chosen(None).tolist() == [0, 1] and text.chosen(1).tolist() == [0]


def test_without_sequences_there_is_no_batch() -> None:
    for divided in (packed_batches, padded_batches):
        assert divided(torch.tensor([], dtype=torch.int64), torch.tensor([]), 4) == []
