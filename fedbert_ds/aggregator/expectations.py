"""Windows that some ranks have announced and others have not. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from fedbert_ds.errors import WireError


@dataclass
class Expectation:
    """Whose updates a window combines, and how."""

    window: int
    average: bool
    clients: dict[str, int] = field(default_factory=dict)
    """Masked tokens behind each one's update."""


class Expectations:
    """Collects each rank's part of a window; the window is complete with the last rank's part.

    Each rank announces its windows in order, so windows complete in order.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._newest: dict[int, int] = {}
        """The last window that each rank has announced."""
        self._parts: dict[int, tuple[Expectation, set[int]]] = {}
        """Of incomplete windows: what is known, and the ranks that have said it."""
        self.complete = -1
        """The newest complete window."""

    def add(self, rank: int, window: int, average: bool, clients: Mapping[str, int]) -> Expectation | None:
        """A rank's part; the whole expectation with the last rank's.

        Raises WireError for a window out of order, or if ranks do not agree on `average`.
        """
        if window <= self._newest.get(rank, -1):
            raise WireError(f"rank {rank} announced window {window} after window {self._newest[rank]}")
        expectation, ranks = self._parts.setdefault(window, (Expectation(window, average), set()))
        if expectation.average != average:
            raise WireError(f"rank {rank} combines window {window} in another way than the ranks before")
        self._newest[rank] = window
        expectation.clients.update(clients)
        ranks.add(rank)
        if len(ranks) < self._ranks:
            return None
        del self._parts[window]
        self.complete = window
        return expectation

    def undo(self, window: int) -> None:
        """The windows from this one on were not announced."""
        self._newest = {rank: min(newest, window - 1) for rank, newest in self._newest.items()}
        self._parts = {number: part for number, part in self._parts.items() if number < window}
        self.complete = min(self.complete, window - 1)

    def drop(self, client: str, delivered: Collection[int] = ()) -> None:
        """Expect nothing of a client in windows that are not complete, but for those whose update
        it has delivered.
        """
        for window, (expectation, _) in self._parts.items():
            if window not in delivered:
                expectation.clients.pop(client, None)
