"""What the pipeline queue decides, for the rank that carries it out."""

from __future__ import annotations

from dataclasses import dataclass

from fedbert_ds.server.queue.packing import MicroBatch, Piece
from fedbert_ds.wire.messages import Manifest


@dataclass(frozen=True)
class Plan:
    """All manifests of a window are here: tell clients their pieces, and that the next manifest is wanted."""

    window: int
    micro_batches: tuple[MicroBatch, ...]
    manifests: tuple[Manifest, ...]
    """What the plan was made from."""
    passed_over: frozenset[str]
    """Clients that gave a manifest and were late since: they have no piece and must be told so."""


@dataclass(frozen=True)
class Open:
    """Give the clients of these pieces credit to send activations."""

    window: int
    micro_batch: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Forward:
    """Run the body forward over these pieces (none: a dummy) and send the hidden states back."""

    micro_batch: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Backward:
    """Run the body backward; pieces of the forward that are not named here get a zero gradient."""

    micro_batch: int
    pieces: tuple[Piece, ...]
    is_last: bool
    """The window's last backward on this rank: the gradient-accumulation boundary."""


@dataclass(frozen=True)
class Skip:
    """This client is late: windows go on without these pieces of it, and without it until it is heard of again."""

    client: str
    micro_batches: tuple[tuple[int, int], ...]
    """(window, micro-batch) of each piece."""


@dataclass(frozen=True)
class Expire:
    """This client owed an answer for too long; it has been counted as lost."""

    client: str


@dataclass(frozen=True)
class Step:
    """Every micro-batch is done: step the optimizer."""

    window: int
    lost_masked_tokens: int
    """Masked tokens of the window whose gradient is missing (zero) because their client was lost or late."""


Decision = Plan | Open | Forward | Backward | Skip | Expire | Step
