"""How many micro-batches a rank keeps under way: enough to hide round trips, if memory allows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

INITIAL_IN_FLIGHT = 4
"""Before anything is measured."""
MOST_IN_FLIGHT = 256
MOST_AHEAD = 256
"""Buffered micro-batches: some 50 MB of activations each at 16,000 tokens, BERT-base."""


@dataclass(frozen=True)
class Demand:
    """What one rank has measured."""

    activations_seconds: float
    """From credit to activations, at its farther clients, with nothing in the way; 0 if unknown."""
    gradient_seconds: float
    """From hidden states to their gradient, likewise."""
    service_seconds: float
    """The body's forward and backward of one micro-batch; 0 if unknown."""
    affordable: int
    """Micro-batches in flight that its memory holds."""


class InFlightLimits(NamedTuple):
    """What all ranks use in the next window; both at least 1."""

    in_flight: int
    """Micro-batches that are forwarded and not backwarded: their graphs are held."""
    ahead: int
    """Micro-batches that have credit or whose activations are here, beyond those in flight."""


def in_flight_limits(demands: Iterable[Demand]) -> InFlightLimits:
    """Limits that hide the round trips of every rank, within the memory of each.

    By Little's law `answer / service` micro-batches are away at any time. After a window's last
    forward only backwards are left, two thirds of the service time each, and their gradients must
    be back already: hence half as many again in flight.
    """
    in_flight, ahead, affordable = 1, 1, MOST_IN_FLIGHT
    for demand in demands:
        affordable = min(affordable, demand.affordable)
        if demand.service_seconds <= 0 or demand.gradient_seconds <= 0:
            in_flight, ahead = max(in_flight, INITIAL_IN_FLIGHT), max(ahead, INITIAL_IN_FLIGHT)
            continue
        in_flight = max(in_flight, 2 + math.ceil(1.5 * demand.gradient_seconds / demand.service_seconds))
        ahead = max(ahead, 2 + math.ceil(demand.activations_seconds / demand.service_seconds))
    in_flight = max(1, min(in_flight, affordable))
    return InFlightLimits(in_flight, min(max(ahead, in_flight), MOST_AHEAD))
