"""Encoded sequences with labels of the owner's: batches of them, and what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedbert_ds.data.masking import Batch, EncodedText, SequenceStream


@dataclass(frozen=True)
class LabelledSequences:
    """Sequences with a label at some of their positions."""

    text: EncodedText
    positions: Tensor
    """[m] int64, ascending, into `text.tokens`: where labels are."""
    labels: Tensor
    """[m]: int64, labels' numbers, or float32, scores."""
    token_types: Tensor | None = None
    """[N] int64: 1 in the second text of a pair. None: no pairs."""

    def batch(self, sequences: Sequence[int]) -> Batch:
        """These sequences, packed in this order."""
        pieces = self.text.pieces(sequences)
        starts = np.cumsum([0, *(piece.stop - piece.start for piece in pieces)])
        bounds = torch.tensor([(piece.start, piece.stop) for piece in pieces], dtype=torch.int64).reshape(-1, 2)
        chosen = [slice(*ends) for ends in torch.searchsorted(self.positions, bounds).tolist()]
        return Batch(
            input_ids=torch.cat([self.text.tokens[piece] for piece in pieces]).long(),
            lengths=[piece.stop - piece.start for piece in pieces],
            masked_positions=torch.cat(
                [
                    self.positions[ours] - piece.start + int(start)
                    for ours, piece, start in zip(chosen, pieces, starts[:-1], strict=True)
                ]
            ),
            labels=torch.cat([self.labels[ours] for ours in chosen]),
            token_types=None
            if self.token_types is None
            else torch.cat([self.token_types[piece] for piece in pieces]).long(),
        )


class LabelledStream(SequenceStream):
    """A stream of labelled sequences; the window changes nothing in them."""

    def __init__(self, sequences: LabelledSequences, *, seed: int, client: int | str) -> None:
        super().__init__(sequences.text, seed=seed, client=client)
        self._sequences = sequences

    def batch_of(self, sequences: Sequence[int], window: int) -> Batch:
        """These sequences with their labels."""
        return self._sequences.batch(sequences)


def held_out_batch(sequences: LabelledSequences, max_tokens: int) -> Batch:
    """Sequences spread evenly over what is held out, about `max_tokens` tokens together at most."""
    return sequences.batch(sequences.text.spread(max_tokens))
