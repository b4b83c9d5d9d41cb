"""The ranks among themselves, apart from the body's collectives: objects, barriers, CPU sums."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

from fedbert_ds.server.body.distributed import PATIENCE

T = TypeVar("T")


class RankGroup:
    """A gloo group of all ranks, apart from the body's backend.

    `gather` and `broadcast` pickle: their objects come only from this run's ranks, never from a
    client.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.update_group = dist.new_group(backend="gloo", timeout=PATIENCE)
        """A second group, for a thread beside the body: within one group, all ranks must run their
        operations in the same order."""
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def gather(self, mine: T) -> list[T]:
        """The objects of all ranks, in order. All ranks call it."""
        everybody: list[Any] = [None] * self.world_size
        dist.all_gather_object(everybody, mine, group=self.group)
        return everybody

    def broadcast(self, from_rank_0: T | None) -> T:
        """Rank 0's object. The other ranks pass None."""
        box: list[Any] = [from_rank_0]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.group)
