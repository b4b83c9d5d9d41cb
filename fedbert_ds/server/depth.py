"""How many micro-batches a rank keeps in flight: enough to hide its clients' answers, no more than memory holds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

FIRST_DEPTH = 4
"""Before anything is measured."""
DEEPEST = 256


@dataclass(frozen=True)
class Demand:
    """What one rank has measured."""

    answer_seconds: float
    """From hidden states to their gradient, at its farther clients, with nothing in the way; 0 if unknown."""
    service_seconds: float
    """The body's forward and backward of one micro-batch; 0 if unknown."""
    affordable: int
    """Micro-batches in flight that its memory holds."""


def depth_for(demands: Iterable[Demand]) -> int:
    """The depth that all ranks use in the next window, at least 1.

    By Little's law `answer / service` micro-batches are away at any time. After a window's last forward only backwards
    are left, two thirds of the service time each, and their gradients must be back already: hence half as many again.
    """
    needed, affordable = 1, DEEPEST
    for demand in demands:
        known = demand.answer_seconds > 0 and demand.service_seconds > 0
        own = 2 + math.ceil(1.5 * demand.answer_seconds / demand.service_seconds) if known else FIRST_DEPTH
        needed, affordable = max(needed, own), min(affordable, demand.affordable)
    return max(1, min(needed, affordable))
