"""Typed data that the rooms of a rank share: what clients may send, what ranks count and tell each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedbert_ds.config import Codec
from fedbert_ds.server.queue.in_flight import Demand

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class TensorContract:
    """What every tensor of one kind must be; the plan adds the number of rows."""

    codec: Codec
    width: int
    most_rows: int
    """No piece has more, so no more memory is taken for one."""


@dataclass(frozen=True)
class Contract:
    """What every message of a client is held against; the same for all clients of a run."""

    activations: TensorContract
    gradients: TensorContract
    longest_sequence: int
    """Tokens."""
    is_rows_cut: bool
    client_model: Shapes
    """Every tensor of a client half."""
    exchanged: Shapes
    """Those that client updates carry."""
    update_codec: Codec = "fp32"
    """Of the matrices in client updates; a client model that is asked for whole is exact."""


@dataclass(frozen=True)
class Arrived:
    """A piece's activations."""

    values: Tensor
    """[tokens, width], or [rows, width] with cut: rows; fp32."""
    row_index: Tensor | None
    """[tokens] int64 into `values`, with cut: rows."""
    masked_positions: Tensor
    """[masked] int64, within the piece."""


@dataclass
class Tally:
    """What one rank counts of one window."""

    loss_sum: float = 0.0
    """Cross-entropies of all masked tokens, nats."""
    tokens: int = 0
    masked_tokens: int = 0
    lost_masked_tokens: int = 0
    busy_seconds: float = 0.0
    wait_seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0
    dummy_micro_batches: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    averaging_bytes_up: int = 0
    averaging_bytes_down: int = 0


@dataclass(frozen=True)
class RankStatus:
    """What a rank tells the others between two windows."""

    num_micro_batches: int
    """Of the next window, on this rank."""
    masked_tokens: int
    """Of the next window, on this rank."""
    demand: Demand
    clients: frozenset[str]
    stop: bool
    problems: tuple[str, ...]
    """Everything that went wrong with clients so far."""
    new_problems: tuple[str, ...]
    """Those of the window that has just ended."""
    tally: Tally = field(default_factory=Tally)
