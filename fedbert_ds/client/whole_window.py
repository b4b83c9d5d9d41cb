"""A window of a client that holds the whole model: parts of bounded size, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fedbert_ds.data.masking import Batch
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.model.dropout_seed import seed_dropout
from fedbert_ds.seeding import stable_seed


@dataclass(frozen=True)
class PartLoss:
    """What one part of a window gave."""

    loss_sum: float
    """Cross-entropies of its masked tokens, nats."""
    masked_tokens: int
    is_last: bool


def parts_of(batch: Batch, capacity: int) -> Iterator[tuple[int, Batch]]:
    """(first sequence, part) of consecutive sequences, at most `capacity` tokens a part.

    A longer sequence is a part of its own. Every sequence is in one part, in order.
    """
    first = 0
    for count in _counts(batch.lengths, capacity):
        yield first, sequences(batch, first, first + count)
        first += count


def sequences(batch: Batch, first: int, last: int) -> Batch:
    """Sequences `first` to `last` - 1 of a batch, as one of its own."""
    tokens, masked = bounds(batch)
    positions = slice(masked[first], masked[last])
    return Batch(
        input_ids=batch.input_ids[tokens[first] : tokens[last]],
        lengths=batch.lengths[first:last],
        masked_positions=batch.masked_positions[positions] - tokens[first],
        labels=batch.labels[positions],
        token_types=None if batch.token_types is None else batch.token_types[tokens[first] : tokens[last]],
    )


def bounds(batch: Batch) -> tuple[list[int], list[int]]:
    """[sequences + 1] bounds of the sequences, in the batch's tokens and masked positions."""
    tokens = torch.tensor([0, *batch.lengths]).cumsum(0)
    return tokens.tolist(), torch.searchsorted(batch.masked_positions, tokens).tolist()


def train_window(
    half: ClientHalf, batch: Batch, capacity: int, dropout_seed: Sequence[str | int], device: torch.device
) -> Iterator[PartLoss]:
    """Compute a window part by part; the half's gradients of its mean cross-entropy accumulate.

    The mean is over the batch's masked tokens. Dropout depends on `dropout_seed` and the part's
    first sequence alone. The gradients are complete after the last part.
    """
    scale = 1.0 / max(1, len(batch.labels))
    parts = list(parts_of(batch, capacity))
    for number, (first, part) in enumerate(parts):
        seed_dropout(stable_seed(*dropout_seed, first), device)
        ids, positions, labels = (t.to(device) for t in (part.input_ids, part.masked_positions, part.labels))
        kinds = None if part.token_types is None else part.token_types.to(device)
        loss_sum = half.whole_backward(ids, part.lengths, positions, labels, scale, kinds)
        yield PartLoss(loss_sum, len(part.labels), number == len(parts) - 1)


def _counts(lengths: Sequence[int], capacity: int) -> Iterator[int]:
    """How many sequences each part takes."""
    count = room = 0
    for length in lengths:
        if count and length > room:
            yield count
            count, room = 0, capacity
        if not count:
            room = capacity
        count, room = count + 1, room - length
    if count:
        yield count
