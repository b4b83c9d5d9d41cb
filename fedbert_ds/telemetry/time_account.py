"""Where a rank's wall time goes: every moment is charged to one part, so the parts sum to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Part = Literal["work", "clients", "ranks", "saving", "evaluating"]
"""What the host does: its own work, which is most of it, or wait for clients or for other ranks; or
it saves, or evaluates."""


class TimeAccount:
    """Seconds by part since the last `take`. What is in no block is work."""

    def __init__(self) -> None:
        self._spent: dict[Part, float] = {}
        self._part: Part = "work"
        self._since = time.monotonic()

    @contextmanager
    def charged(self, part: Part) -> Iterator[None]:
        """Charge what happens inside to this part. A block within a block has its time alone, but
        an evaluation has all of its own, waits too.
        """
        before = self._part
        self._turn_to(before if before == "evaluating" else part)
        try:
            yield
        finally:
            self._turn_to(before)

    def take(self) -> dict[Part, float]:
        """Seconds by part since the last call; all of them are the wall time between the calls."""
        self._turn_to(self._part)
        spent, self._spent = self._spent, {}
        return spent

    def _turn_to(self, part: Part) -> None:
        now = time.monotonic()
        self._spent[self._part] = self._spent.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now
