"""Memory of a micro-batch in flight, and the memory available for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor

from fedbert_kernels.recompute import watching

SHARE = 0.5
"""Share of the memory that is free when the body is built. Optimizer states and network buffers
need the rest."""


@dataclass
class Saved:
    """Storages that a graph keeps for its backward: bytes by identity."""

    storages: dict[int, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all storages, each counted once."""
        return sum(self.storages.values())


@contextmanager
def saved_bytes(parameters: Iterable[Tensor]) -> Iterator[Saved]:
    """Count what graphs built inside this block keep. Parameters do not count."""
    saved = Saved()
    known = {parameter.untyped_storage()._cdata for parameter in parameters}

    def count(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved.storages[storage._cdata] = storage.nbytes()

    def pack(tensor: Tensor) -> Tensor:
        count(tensor)
        return tensor

    with watching(count), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def memory_budget(device: torch.device) -> int:
    """Bytes for micro-batches in flight on this rank: a share of the memory that is free now."""
    if device.type != "cpu":
        free, _ = torch.get_device_module(device).mem_get_info(device)
        return int(SHARE * free)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(SHARE * psutil.virtual_memory().available) // ranks_here
