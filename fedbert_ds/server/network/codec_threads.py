"""How many threads of a rank compress what leaves, and decompress what arrives."""

from __future__ import annotations

import os


def codec_threads(cores: int, ranks: int) -> int:
    """Threads for each of the two directions, where so many ranks share these cores: at least 1."""
    return max(1, cores // max(1, ranks))


def codec_threads_here() -> int:
    """The same for this rank: the cores that it may run on, shared by the ranks of its node."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    return codec_threads(cores, int(ranks))
