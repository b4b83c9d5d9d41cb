"""How many calls an endpoint passes on from each address: a number at once, then some a second.

Pure bookkeeping, without network or clock.
"""

from __future__ import annotations

from collections import OrderedDict

MOST_ADDRESSES = 1000
"""Addresses remembered. Those beyond share what the one that was silent for longest had left."""


class CallRate:
    """Counts calls by address; all times are seconds of the caller's clock."""

    def __init__(self, at_once: float, per_second: float) -> None:
        self._at_once, self._per_second = at_once, per_second
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Of each address: calls that it may make, and when that was so. The latest is last."""

    def admits(self, address: str, now: float) -> bool:
        """Whether one more call from this address is within its rate; it counts if it is."""
        if address in self._left:
            left, since = self._left.pop(address)
        elif len(self._left) < MOST_ADDRESSES:
            left, since = self._at_once, now
        else:
            _, (left, since) = self._left.popitem(last=False)
        left = min(self._at_once, left + self._per_second * (now - since))
        is_within = left >= 1
        self._left[address] = left - is_within, now
        return is_within


def address_of(peer: str) -> str:
    """The address of gRPC's name for a caller, without its port."""
    return peer.rpartition(":")[0]
