"""What ranks say to each other beside the body's own collectives: reports between windows, finished checkpoints."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

KEPT_CHECKPOINTS = 2
COMPLETE = "complete.json"


class RankGroup:
    """A gloo group of all ranks, apart from the body's backend, for small Python objects and fp64 sums on the CPU.

    Objects are pickled: they come from this run's own ranks only, never from a client.
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

    def complete_checkpoint(self, folder: Path, window: int) -> None:
        """All ranks have written their parts: rank 0 marks the checkpoint complete and drops the oldest ones."""
        self.barrier()
        if self.rank == 0:
            mark = folder / f"window-{window}" / COMPLETE
            partial = mark.with_suffix(".partial")
            partial.write_text(json.dumps({"window": window, "ranks": self.world_size}), encoding="utf-8")
            partial.replace(mark)
            for old in sorted(complete_windows(folder))[:-KEPT_CHECKPOINTS]:
                # First, so that a checkpoint that is half deleted is not taken for a complete one.
                (folder / f"window-{old}" / COMPLETE).unlink()
                shutil.rmtree(folder / f"window-{old}")
        self.barrier()


def ranks_of_checkpoints(folder: Path) -> int | None:
    """Number of ranks the complete checkpoints in `folder` were written by; None when there is none."""
    marks = sorted(folder.glob(f"window-*/{COMPLETE}"))
    return int(json.loads(marks[-1].read_text(encoding="utf-8"))["ranks"]) if marks else None


def complete_windows(folder: Path) -> frozenset[int]:
    """Windows whose checkpoint in `folder` is complete."""
    return frozenset(int(mark.parent.name.removeprefix("window-")) for mark in folder.glob(f"window-*/{COMPLETE}"))
