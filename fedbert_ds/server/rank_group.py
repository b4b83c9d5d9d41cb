"""The ranks among themselves, beside the body's own collectives: small objects, barriers, sums on the CPU."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class RankGroup:
    """A gloo group of all ranks, apart from the body's backend.

    Objects come from this run's own ranks only, never from a client.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        self.update_group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        """A second one, for a thread beside the body: operations of one group must be in one order on all ranks."""
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def gather(self, mine: T) -> list[T]:
        """Everybody's object, by rank; all ranks call it."""
        everybody: list[Any] = [None] * self.world_size
        dist.all_gather_object(everybody, mine, group=self.group)
        return everybody

    def broadcast(self, from_rank_0: T | None) -> T:
        """Rank 0's object; the others pass None."""
        box: list[Any] = [from_rank_0]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        dist.barrier(group=self.group)
