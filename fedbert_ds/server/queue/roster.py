"""Clients of a rank, active or suspended, and the manifests they sent for the next window."""

from __future__ import annotations

import math

from fedbert_ds.errors import WireError
from fedbert_ds.wire.messages import Manifest


class Roster:
    """Who takes part in the next window to plan. It is complete once every active client announced.

    A suspended client is connected, but no window waits for it.
    """

    def __init__(self, first_window: int = 0, num_windows: float = math.inf) -> None:
        self.next_window = first_window
        self._num_windows = num_windows
        self._clients: set[str] = set()
        self._suspended: set[str] = set()
        self._missing: set[str] = set()
        """Active clients without a manifest of the next window."""
        self._manifests: dict[str, Manifest] = {}
        self._left_out: set[str] = set()
        """Clients that a window was planned without, until their next manifest."""
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
        """There is a next window, and every active client has announced what it brings."""
        return not self._missing and not self.is_over and not self.is_held

    @property
    def is_deserted(self) -> bool:
        """There are clients, and all are suspended."""
        return bool(self._suspended) and len(self._suspended) == len(self._clients)

    def is_connected(self, client: str) -> bool:
        """Whether it is one of `clients`."""
        return client in self._clients

    def require(self, client: str) -> None:
        """WireError for a client that is not connected."""
        if client not in self._clients:
            raise WireError(f"client {client} is not connected")

    def owes_manifest(self, client: str) -> bool:
        """Whether the next window wants a manifest that this client has not sent."""
        return client not in self._manifests and not self.is_over

    def add(self, client: str, is_awaited: bool = True) -> None:
        """A client has connected; WireError if it already is.

        One that is not awaited begins as if it were suspended: windows go on until it announces.
        """
        if client in self._clients:
            raise WireError(f"client {client} is already connected; give each client its own --id")
        self._clients.add(client)
        (self._missing if is_awaited else self._suspended).add(client)

    def remove(self, client: str) -> None:
        """A client is gone."""
        for names in (self._clients, self._suspended, self._missing, self._left_out):
            names.discard(client)
        self._manifests.pop(client, None)

    def suspend(self, client: str) -> None:
        """The next window does not wait for this client, nor plan it in."""
        self._suspended.add(client)
        self._missing.discard(client)

    def reactivate(self, client: str) -> bool:
        """The next window counts on this client again; False if it was not suspended."""
        if client not in self._suspended:
            return False
        self._suspended.remove(client)
        if client not in self._manifests:
            self._missing.add(client)
        return True

    def announce(self, manifest: Manifest) -> bool:
        """Take a manifest in; False if its window was planned without this client meanwhile.

        WireError for a client that is not connected, a second manifest, or one of another window.
        """
        client = manifest.client
        self.require(client)
        if manifest.window < self.next_window and client in self._left_out:
            return False
        if manifest.window != self.next_window:
            raise WireError(f"client {client}: manifest of window {manifest.window} instead of {self.next_window}")
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
        self._missing = set(self._clients)

    def close(self) -> tuple[tuple[Manifest, ...], frozenset[str]]:
        """Go on to the next window; this one's manifests, and suspended clients that sent one."""
        manifests = tuple(manifest for client, manifest in self._manifests.items() if client not in self._suspended)
        suspended = frozenset(self._suspended & self._manifests.keys())
        self._manifests = {}
        self._left_out |= self._suspended
        self._missing = self._clients - self._suspended
        self.next_window += 1
        return manifests, suspended
