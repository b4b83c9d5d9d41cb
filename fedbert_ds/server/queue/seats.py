"""Each client's seat: its rank, and the tokens it brings to a window. Arithmetic only."""

from __future__ import annotations

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


def window_shares(shard_sizes: Mapping[str, int], window_tokens: int, share: str) -> dict[str, int]:
    """Tokens a window of each client: by its shard (`data`) or the same (`equal`); at least 1."""
    if share == "equal":
        return {client: max(1, window_tokens // len(shard_sizes)) for client in shard_sizes}
    total = sum(shard_sizes.values())
    return {client: max(1, window_tokens * size // total) for client, size in shard_sizes.items()}
