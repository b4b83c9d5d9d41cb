"""How long a device computes on a token, by work that it did without a gap.

A device's clock runs on where it waits for the host to launch the next kernel. Work that was
launched while the device still had other work has no such gap; it tells how long any other work of
its kind can have taken.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

SETTLING = 8
"""Works of a kind in which kernels may still be compiled or tuned."""
TRIES = 3
LEAST_TOKENS = 16
"""Of a work that tells a pace; a dummy has fewer."""


@dataclass(frozen=True)
class Load:
    """What one work is."""

    kind: Literal["forward", "backward", "evaluation"]
    tokens: int


class Pace:
    """Device time of works, less the gaps, as far as they can be known."""

    def __init__(self) -> None:
        self._works: dict[str, int] = defaultdict(int)
        self._per_token: dict[str, float] = {}

    def wants_sample(self, load: Load) -> bool:
        """Whether this work should be launched while the device is held up. Call once for each."""
        self._works[load.kind] += 1
        settled = self._works[load.kind] - SETTLING
        return 0 < settled <= TRIES and load.kind not in self._per_token

    def computed(self, load: Load, seconds: float, may_have_gaps: bool) -> float:
        """Seconds the device computed in a work that took `seconds` from its beginning to its
        end."""
        if not may_have_gaps and load.tokens >= LEAST_TOKENS:
            self._per_token[load.kind] = seconds / load.tokens
        if may_have_gaps and load.kind in self._per_token:
            return min(seconds, self._per_token[load.kind] * load.tokens)
        return seconds
