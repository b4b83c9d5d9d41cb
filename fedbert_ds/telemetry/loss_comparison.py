"""Reported losses, compared between clients: one that is far from the others' is not believed."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median

RECENT_WINDOWS = 20
"""Windows that a client's loss is averaged over."""
LEAST_TOKENS = 200
"""Masked tokens in them: the loss of fewer may be far off by chance."""
FAR = 5.0
"""A loss so many times the median client's, or less than this part of it, is far from it. Texts of
another kind, or learned before the others', differ less.
"""
LEAST_CLIENTS = 3


class LossComparison:
    """Knows whose losses to believe. `add` takes every window's, in nats, by client."""

    def __init__(self) -> None:
        self._recent: dict[str, deque[tuple[float, int]]] = {}
        self.outlying: frozenset[str] = frozenset()
        """Clients whose recent loss is far from the others'."""

    def add(self, losses: Mapping[str, tuple[float, int]]) -> list[str]:
        """(loss sum, masked tokens) of the clients in a window; returns a sentence for each client
        that is outlying from now on.
        """
        for client, loss in losses.items():
            self._recent.setdefault(client, deque(maxlen=RECENT_WINDOWS)).append(loss)
        means = {}
        for client, recent in self._recent.items():
            masked = sum(count for _, count in recent)
            if masked >= LEAST_TOKENS:
                means[client] = sum(loss for loss, _ in recent) / masked
        before, self.outlying = self.outlying, frozenset()
        if len(means) < LEAST_CLIENTS:
            return []
        middle = median(means.values())
        self.outlying = frozenset(client for client, mean in means.items() if not middle / FAR <= mean <= middle * FAR)
        return [
            f"client {client} reports a loss of {means[client]:.3g}, the median client {middle:.3g}: it does not count "
            "in the run's loss"
            for client in sorted(self.outlying - before)
        ]
