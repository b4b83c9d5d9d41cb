"""The body's input of one micro-batch, packed from the pieces of several clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedbert_ds.server.body.engine import BodyInput
from fedbert_ds.server.contract import Arrived
from fedbert_ds.server.queue.packing import Piece
from fedbert_ds.wire.messages import Manifest


def packed_input(
    pieces: Sequence[Piece], arrived: Sequence[Arrived], manifests: Mapping[str, Manifest], seed: int
) -> BodyInput:
    """Put the pieces of a micro-batch one after another; activations stay in parts.

    Positions, sequence bounds and row numbers shift by the pieces before. `arrived` holds each
    piece's activations. `manifests`, by client, give sequence lengths.
    """
    lengths: list[int] = []
    positions, row_indices = [], []
    tokens_before = rows_before = 0
    for piece, item in zip(pieces, arrived, strict=True):
        manifest = manifests[piece.client]
        lengths += manifest.lengths[piece.first_sequence : piece.first_sequence + piece.num_sequences]
        positions.append(item.masked_positions + tokens_before)
        if item.row_index is not None:
            row_indices.append(item.row_index + rows_before)
        tokens_before += piece.tokens
        rows_before += len(item.values)
    return BodyInput(
        activations=[item.values for item in arrived],
        masked_positions=torch.cat(positions),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        row_index=torch.cat(row_indices) if row_indices else None,
        seed=seed,
    )
