"""Who takes part in a window: pure, seeded, the same on every rank and in every resumed run.

Participants are those of a *round*, `round_windows` windows that belong together. They depend on
the run's seed, the round and the members' names alone: neither on the order of names nor on who is
connected. A member that is not there when its turn comes is missing from its windows; a window all
of whose participants are missing holds no text, and its gradient is zero.

A member counts from its `first` window on, and takes part from the first round that begins there or
later.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol

from fedbert_ds.seeding import stable_seed

Members = Mapping[str, int]
"""The first window from which each client counts, by name."""


class Sampler(Protocol):
    """Says who takes part."""

    def takes_part(self, client: str, window: int) -> bool:
        """Whether this client trains in window `window` (0-based). No client that is not a member
        does."""

    def admit(self, client: str, first: int) -> None:
        """One more member, which counts from window `first` on. No round that has begun by then
        changes.
        """


class _ByRound:
    """The members of each round, by name."""

    def __init__(self, members: Members, round_windows: int) -> None:
        self._members, self._round_windows = dict(members), round_windows
        self._starts = sorted(set(members.values()))
        self._names: dict[int, tuple[str, ...]] = {}
        """Sorted, by how many of `_starts` have passed."""

    def admit(self, client: str, first: int) -> None:
        self._members[client] = first
        self._starts = sorted(set(self._members.values()))
        self._names.clear()

    def round_of(self, window: int) -> int:
        return window // self._round_windows

    def names(self, round_: int) -> tuple[str, ...]:
        passed = bisect_right(self._starts, round_ * self._round_windows)
        if passed not in self._names:
            latest = self._starts[passed - 1] if passed else -1
            self._names[passed] = tuple(sorted(name for name, first in self._members.items() if first <= latest))
        return self._names[passed]


class Everybody(_ByRound):
    """All members take part."""

    def takes_part(self, client: str, window: int) -> bool:
        """Once it counts, always."""
        return client in self._members and self._members[client] <= self.round_of(window) * self._round_windows


class Sample(_ByRound):
    """`count` members take part in a round, drawn anew for each, every set as likely as any other.

    So each is expected equally often (the sampling of FedAvg, McMahan et al. 2017). With fewer
    members than `count` all take part.
    """

    def __init__(self, members: Members, round_windows: int, count: int, seed: int) -> None:
        super().__init__(members, round_windows)
        self._count, self._seed = count, seed

    def takes_part(self, client: str, window: int) -> bool:
        """Whether the client is in the sample of the window's round."""
        round_ = self.round_of(window)
        names = self.names(round_)
        place = bisect_right(names, client) - 1
        if place < 0 or names[place] != client:
            return False
        return place in drawn(self._seed, round_, self._count, len(names))


class Turns(_ByRound):
    """One member a round, in the order of names, round and round.

    A member that joins later has its first turn when the order comes to its name.
    """

    def __init__(self, members: Members, round_windows: int) -> None:
        super().__init__(members, round_windows)
        self._rounds: list[tuple[int, int]] = []
        """Where the members change: the round, and the place of the name whose turn it is then."""

    def admit(self, client: str, first: int) -> None:
        """Rounds may have been asked for that have not begun; those that have stay as they are."""
        super().admit(client, first)
        self._rounds.clear()

    def takes_part(self, client: str, window: int) -> bool:
        """Whether it is this client's turn."""
        return client == self._whose(self.round_of(window))

    def _whose(self, round_: int) -> str | None:
        passed = bisect_right(self._starts, round_ * self._round_windows)
        for start in self._starts[len(self._rounds) : passed]:
            changed = -(-start // self._round_windows)
            last = self._whose(changed - 1) if changed else None
            self._rounds.append((changed, bisect_right(self.names(changed), last) if last is not None else 0))
        if not passed:
            return None
        changed, place = self._rounds[passed - 1]
        names = self.names(round_)
        return names[(place + round_ - changed) % len(names)]


@lru_cache(maxsize=1 << 14)
def drawn(seed: int, round_: int, count: int, total: int) -> frozenset[int]:
    """`count` of the numbers below `total`, or all if these are fewer, as the seed draws them.

    Floyd's algorithm (Bentley & Floyd, "A Sample of Brilliance", CACM 1987): `count` draws, however
    large `total` is.
    """
    chosen: set[int] = set()
    for largest in range(max(0, total - count), total):
        number = stable_seed("participants", seed, round_, largest) % (largest + 1)
        chosen.add(largest if number in chosen else number)
    return frozenset(chosen)
