"""Pieces of several clients as one input: positions, bounds and row numbers shift by what is before
them.
"""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.server.body.packed_input import packed_input
from fedbert_ds.server.contract import Arrived
from fedbert_ds.server.queue.packing import Piece, pack
from fedbert_ds.wire.messages import Manifest
from fedbert_kernels.encoded import Encoded


def arrived(values: int, positions: list[int], index: list[int] | None = None) -> Arrived:
    rows = None if index is None else torch.tensor(index)
    return Arrived(Encoded.of(torch.full((values, 2), float(values)), "int8"), rows, torch.tensor(positions))


MANIFESTS = {"ada": Manifest("ada", 0, (9, 3, 2), (1, 1, 1)), "bo": Manifest("bo", 0, (4,), (2,))}
PIECES = [Piece("ada", 1, 2, 5, 2), Piece("bo", 0, 1, 4, 2)]


def test_a_piece_in_the_middle_of_a_clients_sequences() -> None:
    made = packed_input(PIECES, [arrived(5, [0, 4]), arrived(4, [1, 3])], MANIFESTS, seed=7)
    assert made.cu_seqlens.tolist() == [0, 3, 5, 9] and made.cu_seqlens.dtype == torch.int32
    assert made.masked_positions.tolist() == [0, 4, 6, 8]
    assert Encoded.join(made.activations).decode()[:, 0].tolist() == [5.0] * 5 + [4.0] * 4
    assert made.row_index is None and made.seed == 7


def test_rows_of_each_piece_are_numbered_after_those_before() -> None:
    made = packed_input(PIECES, [arrived(2, [0, 4], [0, 1, 0, 0, 1]), arrived(1, [1, 3], [0] * 4)], MANIFESTS, 0)
    assert made.row_index is not None and made.row_index.tolist() == [0, 1, 0, 0, 1, 2, 2, 2, 2]
    assert [len(part) for part in made.activations] == [2, 1]


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(1, 8), min_size=1, max_size=5), min_size=1))
def test_any_packing_keeps_every_sequence_whole(lengths: dict[str, list[int]]) -> None:
    manifests = {name: Manifest(name, 0, tuple(each), (1,) * len(each)) for name, each in lengths.items()}
    seen: list[int] = []
    for pieces in pack(manifests.values(), capacity=10):
        sent = [arrived(piece.tokens, [piece.tokens - 1] * piece.masked) for piece in pieces]
        bounds = packed_input(pieces, sent, manifests, 0).cu_seqlens
        assert bounds[-1] == sum(piece.tokens for piece in pieces)
        seen += bounds.diff().tolist()
    assert seen == [length for name in sorted(lengths) for length in lengths[name]]
