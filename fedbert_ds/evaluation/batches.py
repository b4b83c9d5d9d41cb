"""Masked text in batches of about equal numbers of tokens: without padding, or with little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedbert_ds.data.masking import Batch, EncodedText, Masker
from fedbert_ds.seeding import generator

LIKE = 0.9
"""Length of the shortest sequence of a batch, as a share of the longest, at least."""


@dataclass(frozen=True)
class MaskedText:
    """Sequences one after another, unpadded, with tokens hidden."""

    input_ids: Tensor
    """[N] int64, after masking."""
    targets: Tensor
    """[N] int64: the original ids of tokens to predict, -1 elsewhere."""
    offsets: Tensor
    """[S + 1] int64: bounds of the sequences."""

    @classmethod
    def of(cls, text: EncodedText, masker: Masker, seed: int) -> MaskedText:
        """The whole text, masked by `seed`, whatever of it is read."""
        input_ids, positions, labels = (
            torch.from_numpy(array)
            for array in masker.mask(text.tokens.numpy(), text.word_starts.numpy(), generator("evaluate", seed))
        )
        targets = torch.full_like(input_ids, -1)
        targets[positions] = labels
        return cls(input_ids, targets, text.offsets)

    def chosen(self, max_sequences: int | None) -> Tensor:
        """Numbers of so many sequences, spread evenly over the text, the shortest first."""
        lengths = self.offsets.diff()
        sequences = torch.arange(len(lengths))
        if max_sequences is not None and max_sequences < len(sequences):
            sequences = torch.linspace(0, len(sequences) - 1, max_sequences).round().long()
        return sequences[lengths[sequences].argsort(stable=True)]

    def packed(self, sequences: Sequence[int]) -> Batch:
        """These sequences one after another."""
        pieces = self._pieces(sequences)
        targets = torch.cat([self.targets[piece] for piece in pieces])
        return Batch(
            input_ids=torch.cat([self.input_ids[piece] for piece in pieces]),
            lengths=[piece.stop - piece.start for piece in pieces],
            masked_positions=(targets >= 0).nonzero().flatten(),
            labels=targets[targets >= 0],
        )

    def padded(self, sequences: Sequence[int], padding: int) -> tuple[Tensor, Tensor, Tensor]:
        """Padded input ids, attention mask and targets of these sequences, each [B, L] int64."""
        pieces = self._pieces(sequences)
        ids = [self.input_ids[piece] for piece in pieces]
        return (
            _padded(ids, padding),
            _padded([torch.ones_like(row) for row in ids], 0),
            _padded([self.targets[piece] for piece in pieces], -1),
        )

    def _pieces(self, sequences: Sequence[int]) -> list[slice]:
        return [slice(int(self.offsets[number]), int(self.offsets[number + 1])) for number in sequences]


def packed_batches(sequences: Tensor, lengths: Tensor, batch_size: int) -> list[list[int]]:
    """Divide sequences, in their order: no batch has more tokens than `batch_size` of the longest.

    `lengths` are by number of a sequence.
    """
    if not len(sequences):
        return []
    most = batch_size * int(lengths[sequences].max())
    batches: list[list[int]] = [[]]
    tokens = 0
    for number, length in zip(sequences.tolist(), lengths[sequences].tolist(), strict=True):
        if batches[-1] and tokens + length > most:
            batches.append([])
            tokens = 0
        batches[-1].append(number)
        tokens += length
    return batches


def padded_batches(sequences: Tensor, lengths: Tensor, batch_size: int, like: float = LIKE) -> list[list[int]]:
    """Divide sequences, the shortest first: no batch has more tokens, padded, than `batch_size` of
    the longest.

    `lengths` are by number of a sequence. So short sequences make large batches, and every batch
    costs about the same. The shortest of a batch is at least `like` times as long as the longest;
    with 1.0 there is no padding.
    """
    if not len(sequences):
        return []
    most = batch_size * int(lengths[sequences[-1]])
    batches: list[list[int]] = [[]]
    for number in sequences.tolist():
        longest, batch = int(lengths[number]), batches[-1]
        if batch and ((len(batch) + 1) * longest > most or int(lengths[batch[0]]) < like * longest):
            batches.append([])
        batches[-1].append(number)
    return batches


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
