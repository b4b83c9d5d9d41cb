"""Each client's seat: its rank, and the tokens it brings to a window. Arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Mapping


def assign_clients(shares: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Spread clients over ranks: most tokens first, each to the lightest rank (LPT)."""
    loads = [0] * world_size
    ranks = {}
    for client in sorted(shares, key=lambda name: (-shares[name], name)):
        rank = loads.index(min(loads))
        ranks[client] = rank
        loads[rank] += shares[client]
    return ranks


def window_shares(
    shard_sizes: Mapping[str, int],
    window_tokens: int,
    share: str,
    participants: int | None = None,
    largest: float = math.inf,
) -> dict[str, int]:
    """Tokens of each client in a window it takes part in: by its shard (`data`) or the same
    (`equal`); at least 1.

    A shard's size is what its client says, so it counts for at most `largest` times the lower
    median of all.

    All clients together bring `window_tokens`. Where only `participants` of K take part at a time,
    each brings K / participants times that, so that a window holds `window_tokens` on average, if
    each client takes part equally often; with `equal`, every window does.
    """
    count = len(shard_sizes)
    together = count if participants is None else participants
    if share == "equal":
        return {client: max(1, window_tokens // together) for client in shard_sizes}
    most = _median(shard_sizes) * largest
    sizes = {client: size if size <= most else int(most) for client, size in shard_sizes.items()}
    total = sum(sizes.values()) * together
    return {client: max(1, window_tokens * size * count // total) for client, size in sizes.items()}


def capped(shard_sizes: Mapping[str, int], largest: float) -> dict[str, float]:
    """Clients whose text does not count in full, and how many times the median client's it is."""
    median = _median(shard_sizes)
    return {client: size / median for client, size in sorted(shard_sizes.items()) if size > median * largest}


def _median(shard_sizes: Mapping[str, int]) -> int:
    """The lower one."""
    return sorted(shard_sizes.values())[(len(shard_sizes) - 1) // 2]
