"""What a rank counts of a window, and what it tells the other ranks before the next one."""

from __future__ import annotations

from dataclasses import dataclass

from fedbert_ds.server.queue.in_flight import Demand


@dataclass
class Tally:
    """What one rank counts of one window."""

    loss_sum: float = 0.0
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
    tally: Tally
