"""How long a client's answer may take before a window goes on without it, learned from its own answers."""

from __future__ import annotations

import statistics
from collections import deque

MEMORY = 64
"""Answers of a client that are remembered."""
FEW = 8
"""With fewer answers than this nothing is known of a client, and nobody's window goes on without it."""
FLOOR_SECONDS = 30.0
"""No deadline is shorter: a stall of a laptop or a link is cheaper to wait for than a share of a window to lose."""
SPREADS = 8.0
MULTIPLE = 4.0


class Deadlines:
    """Deadlines from median and spread of each client's round trips.

    A deadline is `MULTIPLE` times (median + `SPREADS` x median absolute deviation), which a tail of slow answers moves
    far less than a mean and a standard deviation would; at least `floor` seconds.
    """

    def __init__(self, floor: float = FLOOR_SECONDS) -> None:
        self.floor = floor
        """Seconds that no deadline is shorter than."""
        self._answers: dict[str, deque[float]] = {}
        self._of_kind: dict[tuple[str, str], deque[float]] = {}

    def learn(self, client: str, seconds: float, what: str = "gradient") -> None:
        """A client took so long from the question to its answer; `what` it answered with."""
        self._answers.setdefault(client, deque(maxlen=MEMORY)).append(seconds)
        self._of_kind.setdefault((what, client), deque(maxlen=MEMORY)).append(seconds)

    def forget(self, client: str) -> None:
        """A client is gone; what was known of it says nothing of the others."""
        self._answers.pop(client, None)
        self._of_kind = {key: answers for key, answers in self._of_kind.items() if key[1] != client}

    def deadline(self, client: str) -> float:
        """Seconds a client's answer may take; infinite while little is known of it."""
        answers = self._answers.get(client, ())
        if len(answers) < FEW:
            return float("inf")
        median = statistics.median(answers)
        spread = statistics.median(abs(seconds - median) for seconds in answers)
        return max(self.floor, MULTIPLE * (median + SPREADS * spread))

    def farthest(self, what: str) -> float:
        """The quickest answer of this kind of each client, and of these the 90th percentile: seconds, 0 without any.

        Its quickest answer is a client's round trip and work; what it takes more waited behind others.
        """
        quickest = sorted(min(answers) for (kind, _), answers in self._of_kind.items() if kind == what)
        return quickest[9 * (len(quickest) - 1) // 10] if quickest else 0.0
