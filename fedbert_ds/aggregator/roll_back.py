"""Windows that the ranks undo at the aggregator: who has said so, and who has heard. Pure
bookkeeping.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedbert_ds.errors import WireError
from fedbert_ds.wire import fedbert_pb2 as pb


class RollBack:
    """Collects each rank's word for it; with the last rank's the windows are undone."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._attempt = 0
        """How often windows were undone, as the ranks count."""
        self._said: set[int] = set()
        """Ranks that have undone windows, while others have not."""
        self._waiting: list[pb.BeginClient] = []
        self._unaware: set[str] = set()
        """Clients that have not heard of the last time."""

    def add(self, rank: int, attempt: int) -> bool:
        """A rank's word; whether it was the last one. WireError for a time that is over."""
        if attempt <= self._attempt:
            raise WireError(f"rank {rank}: windows undone for time {attempt} after time {self._attempt}")
        self._said.add(rank)
        if len(self._said) < self._ranks:
            return False
        self._said.clear()
        self._attempt = attempt
        return True

    def waits(self, begin: pb.BeginClient) -> bool:
        """Whether a client must wait to begin, because some ranks have undone windows; `undone`
        returns it.
        """
        if self._said:
            self._waiting.append(begin)
        return bool(self._said)

    def undone(self, clients: Iterable[str]) -> list[pb.BeginClient]:
        """The windows are undone, which these clients have not heard; returns who may begin now."""
        self._unaware = set(clients)
        waiting, self._waiting = self._waiting, []
        return waiting

    def hears(self, client: str, message: pb.ClientMessage) -> bool:
        """Whether a client's message is of what is under way: neither its word that it has heard
        of the last time, nor from before that.
        """
        if message.HasField("begun"):
            if message.begun.attempt == self._attempt:
                self._unaware.discard(client)
            return False
        return client not in self._unaware

    def forget(self, client: str) -> None:
        """The client is gone; another process of its name knows nothing of before."""
        self._unaware.discard(client)
