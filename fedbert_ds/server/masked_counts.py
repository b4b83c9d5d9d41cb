"""Masked tokens of a rank's clients, as the server counts them: the weights of their updates.

Pure bookkeeping, from the manifests of planned windows; no client is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedbert_ds.wire.messages import Manifest

Count = tuple[int, int]
"""Masked tokens in the run so far, and since the client's last exchanged update."""


class MaskedCounts:
    """Counts by client. A window counts once it is committed."""

    def __init__(self, committed: Mapping[str, Count] | None = None) -> None:
        self._committed: dict[str, Count] = dict(committed or {})
        self._running: dict[str, int] = {}

    def begin(self, manifests: Iterable[Manifest]) -> None:
        """These make up the window that begins; one that was begun before and not committed has
        not happened.
        """
        self._running = {manifest.client: sum(manifest.masked) for manifest in manifests}

    def behind_updates(self, clients: Iterable[str], least: int = 0) -> dict[str, int]:
        """Those since each client's last update and in the running window; at least `least`."""
        return {
            client: max(least, self._committed.get(client, (0, 0))[1] + self._running.get(client, 0))
            for client in clients
        }

    def commit(self, is_exchanged: bool) -> None:
        """The running window is trained; with `is_exchanged`, updates were sent after it."""
        for client, masked in self._running.items():
            total, since = self._committed.get(client, (0, 0))
            self._committed[client] = total + masked, since + masked
        self._running = {}
        if is_exchanged:
            self._committed = {client: (total, 0) for client, (total, _) in self._committed.items()}

    @property
    def committed(self) -> dict[str, Count]:
        """For a checkpoint."""
        return dict(self._committed)

    def totals(self, clients: Iterable[str]) -> dict[str, int]:
        """Masked tokens of each of this rank's `clients` in the run so far.

        A rank that has resumed also knows older counts, of the other ranks' clients.
        """
        return {client: self._committed[client][0] for client in clients if client in self._committed}

    def roll_back(self, committed: Mapping[str, Count]) -> None:
        """Go back to the counts of a checkpoint."""
        self._committed, self._running = dict(committed), {}
