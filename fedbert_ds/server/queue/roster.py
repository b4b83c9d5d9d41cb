"""Clients of a rank, active or suspended, and the manifests they sent for windows to come."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from fedbert_ds.errors import WireError
from fedbert_ds.wire.messages import Manifest

TakesPart = Callable[[str, int], bool]
"""(client, window) -> whether the client trains in that window, if it is there."""


def everybody(client: str, window: int) -> bool:
    """All clients take part in all windows."""
    return True


def next_window_of(client: str, takes_part: TakesPart, first: int, num_windows: float) -> int:
    """The first window from `first` on that a client takes part in; `num_windows` if there is none.

    With infinite `num_windows` it must take part in some window.
    """
    window = first
    while window < num_windows and not takes_part(client, window):
        window += 1
    return window


class Roster:
    """Who takes part in the next window to plan. It is complete once every active participant
    announced.

    A client announces, some windows ahead, the next window that it takes part in; the windows
    before go on without it. A suspended client is connected, but no window waits for it.
    """

    def __init__(self, first_window: int = 0, num_windows: float = math.inf, takes_part: TakesPart = everybody) -> None:
        self.next_window = first_window
        self._num_windows = num_windows
        self._takes_part = takes_part
        self._clients: set[str] = set()
        self._suspended: set[str] = set()
        self._participants: set[str] = set()
        """Connected clients that take part in the next window."""
        self._missing: set[str] = set()
        """Active participants without a manifest of the next window."""
        self._manifests: dict[str, Manifest] = {}
        """Of each client's own next window."""
        self._left_out: set[str] = set()
        """Clients that a window of theirs was planned without, until their next manifest."""
        self.is_held = False
        """No window is planned, whoever has announced."""

    @property
    def clients(self) -> frozenset[str]:
        """Connected clients."""
        return frozenset(self._clients)

    @property
    def active(self) -> frozenset[str]:
        """Connected clients that are not suspended."""
        return frozenset(self._clients - self._suspended)

    @property
    def is_over(self) -> bool:
        """The run's last window is planned: no manifest is wanted any more."""
        return self.next_window >= self._num_windows

    @property
    def is_complete(self) -> bool:
        """There is a next window, and every active participant has announced what it brings."""
        return not self._missing and not self.is_over and not self.is_held

    @property
    def is_deserted(self) -> bool:
        """The next window has participants here, and all are suspended."""
        return bool(self._participants) and self._participants <= self._suspended

    def would_be_empty(self, elsewhere: frozenset[str] | None) -> bool:
        """Only suspended clients, all of this rank, take part in the next window.

        `elsewhere` are the active clients of other ranks; None: some of them take part in it.
        """
        return elsewhere is not None and self.is_deserted and not self.takes_part(elsewhere)

    def takes_part(self, clients: Iterable[str]) -> bool:
        """Whether any of these clients, of whichever rank, takes part in the next window."""
        return any(self._takes_part(client, self.next_window) for client in clients)

    def next_window_of(self, client: str) -> int:
        """The next window to plan that this client takes part in; the number of windows if there is
        none.
        """
        return next_window_of(client, self._takes_part, self.next_window, self._num_windows)

    def is_connected(self, client: str) -> bool:
        """Whether it is one of `clients`."""
        return client in self._clients

    def require(self, client: str) -> None:
        """WireError for a client that is not connected."""
        if client not in self._clients:
            raise WireError(f"client {client} is not connected")

    def owes_manifest(self, client: str) -> bool:
        """Whether the next window wants a manifest that this client has not sent."""
        return client in self._participants and client not in self._manifests and not self.is_over

    @property
    def awaited(self) -> list[str]:
        """Participants of the next window that are asked something: active ones for a manifest,
        suspended ones for any sign of life.
        """
        waiting = self._participants - self._manifests.keys() | self._participants & self._suspended
        return [] if self.is_over else sorted(waiting)

    def add(self, client: str, is_awaited: bool = True) -> None:
        """A client has connected; WireError if it already is.

        One that is not awaited begins as if it were suspended: windows go on until it announces.
        """
        if client in self._clients:
            raise WireError(f"client {client} is already connected; give each client its own --id")
        self._clients.add(client)
        if not is_awaited:
            self._suspended.add(client)
        if self._takes_part(client, self.next_window):
            self._participants.add(client)
            if is_awaited:
                self._missing.add(client)

    def remove(self, client: str) -> None:
        """A client is gone."""
        for names in (self._clients, self._suspended, self._participants, self._missing, self._left_out):
            names.discard(client)
        self._manifests.pop(client, None)

    def suspend(self, client: str) -> None:
        """No window waits for this client, nor plans it in."""
        self._suspended.add(client)
        self._missing.discard(client)

    def reactivate(self, client: str) -> bool:
        """Windows count on this client again; False if it was not suspended."""
        if client not in self._suspended:
            return False
        self._suspended.remove(client)
        if client in self._participants and client not in self._manifests:
            self._missing.add(client)
        return True

    def announce(self, manifest: Manifest) -> bool:
        """Take a manifest in; False if its window was planned without this client meanwhile.

        WireError for a client that is not connected, a second manifest, or one of another window
        than the client's next.
        """
        client = manifest.client
        self.require(client)
        if manifest.window < self.next_window and client in self._left_out:
            self._left_out.discard(client)  # it is told what comes next, and may be wrong once
            return False
        expected = self.next_window_of(client)
        if manifest.window != expected:
            raise WireError(f"client {client}: manifest of window {manifest.window} instead of {expected}")
        if client in self._manifests:
            raise WireError(f"client {client}: a second manifest of window {manifest.window}")
        self._manifests[client] = manifest
        self._missing.discard(client)
        self._left_out.discard(client)
        return True

    def roll_back(self, window: int) -> None:
        """`window` is next again: every connected client must announce it anew."""
        self.next_window = window
        self._manifests.clear()
        self._left_out.clear()
        self._suspended.clear()
        self._participants = {client for client in self._clients if self._takes_part(client, window)}
        self._missing = set(self._participants)

    def close(self) -> tuple[tuple[Manifest, ...], frozenset[str]]:
        """Go on to the next window; this one's manifests, and suspended clients that sent one."""
        announced = [client for client in self._manifests if client in self._participants]
        of_this_window = {client: self._manifests.pop(client) for client in announced}
        manifests = tuple(manifest for client, manifest in of_this_window.items() if client not in self._suspended)
        suspended = frozenset(self._suspended & of_this_window.keys())
        self._left_out |= self._suspended & self._participants
        self.next_window += 1
        self._participants = {client for client in self._clients if self._takes_part(client, self.next_window)}
        self._missing = self._participants - self._suspended - self._manifests.keys()
        return manifests, suspended
