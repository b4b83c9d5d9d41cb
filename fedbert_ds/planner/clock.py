"""A discrete-event clock, and what serves one job at a time on it: links and processors."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Clock:
    """Events in the order of their times; those of one time in the order they were set."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds."""
        self.events = 0
        """Events set so far."""
        self._pending: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Set an event."""
        heapq.heappush(self._pending, (when, self.events, what))
        self.events += 1

    def advance(self) -> bool:
        """Go on to the next event and let it happen; False if there is none."""
        if not self._pending:
            return False
        self.now, _, what = heapq.heappop(self._pending)
        what()
        return True


class Pipe:
    """Serves one job after another: a processor, or one direction of a link."""

    def __init__(self) -> None:
        self.free_at = 0.0
        """When the jobs so far are done."""
        self.busy = 0.0
        """Seconds of work so far."""

    def take(self, now: float, seconds: float) -> float:
        """Accept a job of so many seconds; returns when it is done."""
        self.free_at = max(now, self.free_at) + seconds
        self.busy += seconds
        return self.free_at


class Cores:
    """Several processors behind one queue."""

    def __init__(self, count: int) -> None:
        self._pipes = [Pipe() for _ in range(count)]

    def take(self, now: float, seconds: float) -> float:
        """Give a job to the processor that is free first; returns when it is done."""
        return min(self._pipes, key=lambda pipe: pipe.free_at).take(now, seconds)
