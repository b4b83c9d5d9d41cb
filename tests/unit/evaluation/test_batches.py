"""Batches hold every sequence once, little padding, and no more tokens than asked."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.evaluation.batches import LIKE, MaskedText, batches_of


@given(st.lists(st.integers(1, 128), min_size=1, max_size=200), st.integers(1, 40))
def test_every_sequence_is_in_one_batch_within_the_bound(lengths: list[int], batch_size: int) -> None:
    sizes = torch.tensor(lengths)
    batches = batches_of(sizes.argsort(stable=True), sizes, batch_size)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    padded = [len(batch) * max(lengths[number] for number in batch) for batch in batches]
    assert max(padded) <= batch_size * max(lengths)
    # None could be joined with the next: its first would not have fitted.
    for batch, following in itertools.pairwise(batches):
        longest = lengths[following[0]]
        assert (len(batch) + 1) * longest > batch_size * max(lengths) or lengths[batch[0]] < LIKE * longest
    assert all(min(of) >= LIKE * max(of) for batch in batches for of in [[lengths[number] for number in batch]])


def test_of_many_sequences_little_is_padding() -> None:
    sizes = torch.randint(4, 129, (5000,), generator=torch.Generator().manual_seed(1))
    batches = batches_of(sizes.argsort(stable=True), sizes, 32)
    padded = sum(len(batch) * int(sizes[batch].max()) for batch in batches)
    assert int(sizes.sum()) / padded > 0.95
    assert len(batches) < 0.7 * len(sizes) / 32, "short ones make larger batches"


def test_a_batch_is_padded_where_its_sequences_end() -> None:
    text = MaskedText(torch.arange(1, 6), torch.tensor([-1, 7, -1, -1, 8]), torch.tensor([0, 2, 5]))
    ids, attention, targets = text.batch([0, 1], padding=99)
    assert ids.tolist() == [[1, 2, 99], [3, 4, 5]]
    assert attention.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert targets.tolist() == [[-1, 7, -1], [-1, -1, 8]]
    assert text.chosen(None).tolist() == [0, 1] and text.chosen(1).tolist() == [0]


def test_without_sequences_there_is_no_batch() -> None:
    assert batches_of(torch.tensor([], dtype=torch.int64), torch.tensor([]), 4) == []
