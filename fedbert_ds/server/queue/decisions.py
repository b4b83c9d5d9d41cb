"""What the pipeline queue decides and the rank carries out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedbert_ds.server.queue.packing import MicroBatch, Piece
from fedbert_ds.wire.messages import Manifest


@dataclass(frozen=True)
class Plan:
    """All manifests of a window are here: tell clients their pieces, ask for the next manifest."""

    window: int
    micro_batches: tuple[MicroBatch, ...]
    manifests: tuple[Manifest, ...]
    """The manifests that were packed."""
    suspended: frozenset[str]
    """Suspended clients that sent a manifest: they have no piece and must be told so."""

    def without(self, client: str) -> Plan:
        """The plan without this client's manifest."""
        return replace(self, manifests=tuple(one for one in self.manifests if one.client != client))


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
    """Run the body backward; pieces of the forward that are missing here get a zero gradient."""

    micro_batch: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Suspend:
    """This client is late: its pieces are skipped, and no window waits for it until it answers."""

    client: str
    skipped: tuple[tuple[int, int], ...]
    """(window, micro-batch) of each piece."""


@dataclass(frozen=True)
class Expire:
    """This client was silent beyond `silence_timeout`; the queue has already dropped it."""

    client: str


@dataclass(frozen=True)
class Step:
    """Every micro-batch is done: step the optimizer."""

    window: int
    lost_masked_tokens: int
    """Masked tokens of the window without a gradient (zero): their client was lost or suspended."""


Decision = Plan | Open | Forward | Backward | Suspend | Expire | Step
