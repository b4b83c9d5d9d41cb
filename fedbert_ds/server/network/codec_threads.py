"""How many threads of a rank decompress what arrives, and as many compress what leaves."""

from __future__ import annotations

from collections.abc import Collection


def codec_threads(own: Collection[int], allowed: Collection[int], ranks: int) -> int:
    """Threads each way, at least 1: a rank's `own` cores, or, where it is not bound to any, those
    it is `allowed`, divided by the node's `ranks`.
    """
    return max(1, len(own) or len(allowed) // max(1, ranks))
