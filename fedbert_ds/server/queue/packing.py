"""A rank's part of a window: manifests in, micro-batches out. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedbert_ds.wire.messages import Manifest


@dataclass(frozen=True)
class Piece:
    """Consecutive sequences of one client inside one micro-batch."""

    client: str
    first_sequence: int
    num_sequences: int
    tokens: int
    masked: int


@dataclass(frozen=True)
class MicroBatch:
    """What one forward of the body takes; a dummy, for lockstep, if it has no pieces."""

    index: int
    """Unique among all windows of its rank."""
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all pieces; 0 for a dummy."""
        return sum(piece.tokens for piece in self.pieces)


def pack(manifests: Iterable[Manifest], capacity: int, clients_together: int = 1) -> list[tuple[Piece, ...]]:
    """Pack the sequences of a rank's clients into micro-batches of at most `capacity` tokens.

    Sequences are taken in the order of client names. Packing is next-fit: a sequence that does not
    fit opens a new micro-batch, so a client's sequences stay together, a slow client holds up only
    its own micro-batches and the two it shares, and clients early in the plan are done with the
    window early. Raises ValueError when a sequence is longer than a micro-batch.

    With `clients_together` above 1 so many clients share each micro-batch in about equal parts, and
    work on it side by side: more of them are busy at a time, with shorter answers, for more bytes
    where rows are sent once a message.
    """
    ordered = sorted(manifests, key=lambda manifest: manifest.client)
    if clients_together == 1:
        return _pack_one_after_another(ordered, capacity)
    groups = [ordered[first : first + clients_together] for first in range(0, len(ordered), clients_together)]
    return [pieces for group in groups for pieces in _pack_side_by_side(group, capacity)]


def _pack_one_after_another(manifests: Iterable[Manifest], capacity: int) -> list[tuple[Piece, ...]]:
    micro_batches: list[tuple[Piece, ...]] = []
    current: list[Piece] = []
    filled = 0
    for manifest in manifests:
        first, tokens, masked = 0, 0, 0
        for number, (length, wanted) in enumerate(zip(manifest.lengths, manifest.masked, strict=True)):
            if length > capacity:
                raise ValueError(f"a sequence of {length} tokens does not fit a micro-batch of {capacity}")
            if filled + length > capacity:
                if number > first:
                    current.append(Piece(manifest.client, first, number - first, tokens, masked))
                micro_batches.append(tuple(current))
                current, filled = [], 0
                first, tokens, masked = number, 0, 0
            filled += length
            tokens += length
            masked += wanted
        current.append(Piece(manifest.client, first, len(manifest.lengths) - first, tokens, masked))
    if current:
        micro_batches.append(tuple(current))
    return micro_batches


def _pack_side_by_side(manifests: Sequence[Manifest], capacity: int) -> list[tuple[Piece, ...]]:
    micro_batches: list[tuple[Piece, ...]] = []
    taken = dict.fromkeys((manifest.client for manifest in manifests), 0)
    while left := [manifest for manifest in manifests if taken[manifest.client] < len(manifest.lengths)]:
        pieces: list[Piece] = []
        room = capacity
        for number, manifest in enumerate(left):
            first = last = taken[manifest.client]
            # At least one sequence of somebody, so that every micro-batch holds something.
            quota = room // (len(left) - number) if pieces else max(room // len(left), manifest.lengths[first])
            if quota > capacity:
                raise ValueError(f"a sequence of {quota} tokens does not fit a micro-batch of {capacity}")
            tokens = 0
            while last < len(manifest.lengths) and tokens + manifest.lengths[last] <= quota:
                tokens += manifest.lengths[last]
                last += 1
            if last > first:
                masked = sum(manifest.masked[first:last])
                pieces.append(Piece(manifest.client, first, last - first, tokens, masked))
                taken[manifest.client] = last
                room -= tokens
        micro_batches.append(tuple(pieces))
    return micro_batches
