"""Batches hold each sequence with its own labels, and the cursor decides which sequences."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.data.labelled import LabelledSequences, LabelledStream, held_out_batch
from fedbert_ds.data.masking import EncodedText


def sequences_of(lengths: list[int], pairs: bool = False) -> LabelledSequences:
    """Tokens number themselves; every third token of a sequence has its own number as its label."""
    total = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(int(a), int(b), 3) for a, b in pairwise(offsets)])
    text = EncodedText(torch.arange(total, dtype=torch.int32), offsets, torch.ones(total, dtype=torch.bool))
    return LabelledSequences(text, positions, positions.clone(), torch.arange(total) % 2 if pairs else None)


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(LENGTHS, st.data())
def test_a_batch_holds_sequences_with_their_labels(lengths: list[int], data: st.DataObject) -> None:
    sequences = sequences_of(lengths, pairs=True)
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=8))
    batch = sequences.batch(chosen)
    offsets = sequences.text.offsets.tolist()
    expected = [token for number in chosen for token in range(offsets[number], offsets[number + 1])]
    assert batch.input_ids.tolist() == expected and batch.input_ids.dtype == torch.int64
    assert batch.lengths == [lengths[number] for number in chosen]
    assert batch.token_types is not None and batch.token_types.tolist() == [token % 2 for token in expected]
    # A label is its token's number, so a label that has moved shows.
    assert batch.labels.tolist() == batch.input_ids[batch.masked_positions].tolist()
    assert len(batch.labels) == sum(-(-lengths[number] // 3) for number in chosen)


@given(LENGTHS, st.integers(1, 30))
def test_an_epoch_brings_every_sequence_once(lengths: list[int], max_tokens: int) -> None:
    stream = LabelledStream(sequences_of(lengths), seed=1, client="ada")
    seen: list[int] = []
    while len(seen) < len(lengths):
        batch = stream.next_batch(0, max_tokens)
        starts = torch.tensor([0, *batch.lengths[:-1]]).cumsum(0)
        seen += batch.input_ids[starts].tolist()
    assert sorted(seen[: len(lengths)]) == sequences_of(lengths).text.offsets[:-1].tolist()


def test_a_cursor_resumes_and_the_window_changes_nothing() -> None:
    sequences = sequences_of([4, 2, 7, 5, 3])
    stream = LabelledStream(sequences, seed=1, client="ada")
    stream.next_batch(0, 9)
    cursor = stream.state_dict()
    following = [stream.next_batch(window, 9) for window in range(1, 6)]
    other = LabelledStream(sequences, seed=1, client="ada")
    other.load_state_dict(cursor)
    for expected in following:
        again = other.next_batch(77, 9)
        assert torch.equal(again.input_ids, expected.input_ids) and torch.equal(again.labels, expected.labels)


def test_held_out_sequences_are_spread_over_the_text() -> None:
    sequences = sequences_of([10] * 20)
    batch = held_out_batch(sequences, 50)
    assert batch.input_ids.view(-1, 10)[:, 0].tolist() == [0, 50, 100, 140, 190]
    assert held_out_batch(sequences, 10_000).lengths == [10] * 20
