"""The body's input of one micro-batch, packed from the pieces of several clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedbert_ds.server.body.device_work import Device
from fedbert_ds.server.contract import Arrived
from fedbert_ds.server.queue.packing import Piece
from fedbert_ds.wire.messages import Manifest
from fedbert_kernels.encoded import Encoded


@dataclass(frozen=True)
class BodyInput:
    """Input of one forward of the body, on the CPU or the body's device."""

    activations: Sequence[Encoded]
    """[tokens, width], or [rows, width] with cut: rows, in parts: the pieces'."""
    masked_positions: Tensor
    """[masked] int64: positions whose hidden states are wanted."""
    cu_seqlens: Tensor
    """[sequences + 1] int32."""
    row_index: Tensor | None
    """[tokens] int64 into the rows of `activations`; None unless cut: rows."""
    seed: int
    """Seeds this micro-batch's dropout, so that neither order nor recomputation changes it."""

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return int(self.cu_seqlens[-1])

    def values(self, dtype: torch.dtype) -> Tensor:
        """Of all activations, joined by `to`; a tensor of its own for autograd."""
        (activations,) = self.activations
        # Some codes are the values.
        return activations.decode(dtype).detach()

    def to(self, device: Device) -> BodyInput:
        """The same input on a device, its activations in one part."""
        index = None if self.row_index is None else device.upload([self.row_index])
        activations = Encoded.join(self.activations, device.upload)
        return BodyInput([activations], device.upload([self.masked_positions]), self.cu_seqlens, index, self.seed)


def unused_input(lengths: tuple[int, ...], num_masked: int, width: int, with_rows: bool, seed: int) -> BodyInput:
    """Zeros for sequences of these lengths."""
    num_tokens = sum(lengths)
    return BodyInput(
        activations=[Encoded.zeros(num_tokens, width, "fp32")],
        masked_positions=torch.arange(num_masked),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        row_index=torch.zeros(num_tokens, dtype=torch.int64) if with_rows else None,
        seed=seed,
    )


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
