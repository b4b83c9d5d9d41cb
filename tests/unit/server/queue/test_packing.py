"""The plan of a window: sequences of several clients packed into micro-batches."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbert_ds.server.queue.packing import MicroBatch, Piece, pack
from fedbert_ds.wire.messages import Manifest

CAPACITY = 16

SEQUENCES = st.lists(
    st.integers(1, CAPACITY).flatmap(lambda length: st.tuples(st.just(length), st.integers(0, length))),
    min_size=1,
    max_size=12,
)


@st.composite
def federations(draw: st.DrawFn) -> list[Manifest]:
    """Manifests of a rank's clients, in any order of arrival."""
    names = draw(st.lists(st.text("abcxyz", min_size=1, max_size=3), unique=True, max_size=8))
    return [Manifest(name, 3, *zip(*draw(SEQUENCES), strict=True)) for name in names]


TOGETHER = st.integers(1, 4)


@settings(max_examples=50)
@given(manifests=federations(), together=TOGETHER)
def test_every_sequence_is_in_one_piece_of_one_micro_batch(manifests: list[Manifest], together: int) -> None:
    placed = [piece for pieces in pack(manifests, CAPACITY, together) for piece in pieces]
    for manifest in manifests:
        end = 0
        for piece in (piece for piece in placed if piece.client == manifest.client):
            assert piece.first_sequence == end and piece.num_sequences > 0
            end += piece.num_sequences
            assert piece.tokens == sum(manifest.lengths[piece.first_sequence : end])
            assert piece.masked == sum(manifest.masked[piece.first_sequence : end])
        assert end == len(manifest.lengths)


@settings(max_examples=50)
@given(manifests=federations(), together=TOGETHER)
def test_micro_batches_fit(manifests: list[Manifest], together: int) -> None:
    packed = pack(manifests, CAPACITY, together)
    for pieces in packed:
        assert 0 < sum(piece.tokens for piece in pieces) <= CAPACITY
        clients = [piece.client for piece in pieces]
        assert len(set(clients)) == len(clients), "one piece for each client"
    if together == 1:
        # Next-fit: two neighbours together always hold more than one micro-batch can.
        for one, other in itertools.pairwise(packed):
            assert sum(piece.tokens for piece in one + other) > CAPACITY
        placed = [piece.client for pieces in packed for piece in pieces]
        assert placed == sorted(placed), "clients one after another"


@settings(max_examples=50)
@given(manifests=federations(), together=TOGETHER, data=st.data())
def test_the_plan_does_not_depend_on_who_came_first(
    manifests: list[Manifest], together: int, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(manifests))
    assert pack(shuffled, CAPACITY, together) == pack(manifests, CAPACITY, together)


def test_packing_by_hand() -> None:
    ada = Manifest("ada", 0, (4, 3, 5), (1, 0, 2))
    bo = Manifest("bo", 0, (2, 8), (1, 3))
    assert pack([bo, ada], 8) == [
        (Piece("ada", 0, 2, tokens=7, masked=1),),  # 4 + 3; 5 more do not fit
        (Piece("ada", 2, 1, tokens=5, masked=2), Piece("bo", 0, 1, tokens=2, masked=1)),  # 5, shared with 2 of bo's
        (Piece("bo", 1, 1, tokens=8, masked=3),),  # exactly full
    ]
    assert pack([], 8) == []
    assert MicroBatch(3, ()).tokens == 0
    assert MicroBatch(3, (Piece("ada", 2, 1, 5, 2), Piece("bo", 0, 1, 2, 1))).tokens == 7


def test_a_sequence_longer_than_a_micro_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="a sequence of 9 tokens does not fit a micro-batch of 8"):
        pack([Manifest("ada", 0, (4, 9), (1, 1))], 8)
