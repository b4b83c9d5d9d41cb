"""Where each client stands in its text: after the windows that are trained, and after later ones.

Pure bookkeeping. A cursor is the `epoch`, `position` and `sequences` of a client's batch stream.
"""

from __future__ import annotations

from collections.abc import Mapping

Cursor = Mapping[str, int]


class Cursors:
    """Cursors by client. A client that comes back goes on after the last window that counts."""

    def __init__(self, committed: Mapping[str, Cursor]) -> None:
        self._committed = dict(committed)
        self._announced: dict[str, dict[int, Cursor]] = {}
        """After the windows that clients have announced and that may still be rolled back."""

    @property
    def committed(self) -> dict[str, Cursor]:
        """After the last window that is trained, by client; without clients at their beginning."""
        return dict(self._committed)

    def announce(self, client: str, window: int, cursor: Cursor) -> None:
        """A client's manifest of `window` says where its text goes on after it."""
        self._announced.setdefault(client, {})[window] = cursor

    def commit(self, window: int) -> None:
        """`window`, and every one before it, is trained."""
        for client, announced in self._announced.items():
            trained = [number for number in announced if number <= window]
            if trained:
                self._committed[client] = announced[max(trained)]
            for number in trained:
                del announced[number]

    def forget(self, client: str, counts: int | None = None) -> None:
        """A client is gone: what it announced and nobody trained will be announced again.

        Part of its window `counts` is trained already: its text goes on after that one.
        """
        announced = self._announced.pop(client, {})
        if counts in announced:
            self._announced[client] = {counts: announced[counts]}

    def roll_back(self, committed: Mapping[str, Cursor] | None = None) -> None:
        """Forget what is announced; with `committed`, go back to the cursors of a checkpoint."""
        self._announced.clear()
        if committed is not None:
            self._committed = dict(committed)
