"""Who may speak to an endpoint: decided before a join or a stream is looked at."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedbert_ds.errors import WireError, one_line
from fedbert_ds.wire.identity import LONGEST_NAME, RevocationList, fingerprint_of_peer, is_name, name_of_peer

TOLD_AT_ONCE = 5
"""Refusals that are told in a period; the others are counted."""
PERIOD_SECONDS = 60.0

REVOCATIONS_SECONDS = 5.0
"""After so long a revocation ends the streams of a certificate, too."""

Caller = Mapping[str, Sequence[bytes]]
"""gRPC's authentication context: what the certificate says that it has verified."""


@dataclass(frozen=True)
class DoorRules:
    """What the run file and the launcher say about who may come."""

    allowed: tuple[str, ...] | None = None
    """Names that may come besides local clients; None: every name."""
    revoked: Path | None = None
    """A list of certificates that no longer count."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Of each local client: what its launcher has handed to it alone."""

    def to_json(self) -> dict[str, Any]:
        """For a process of its own; `from_json` reads it."""
        return {
            "allowed": self.allowed,
            "revoked": str(self.revoked) if self.revoked else None,
            "tokens": dict(self.tokens),
        }

    @staticmethod
    def from_json(facts: Mapping[str, Any]) -> DoorRules:
        """What `to_json` wrote."""
        allowed, revoked = facts["allowed"], facts["revoked"]
        return DoorRules(
            tuple(allowed) if allowed is not None else None, Path(revoked) if revoked else None, facts["tokens"]
        )


def _print(line: str) -> None:
    print(line, flush=True)


class Refusals:
    """Tells of refusals, a few in each period, and counts the others: a stranger fills no log."""

    def __init__(self, tell: Callable[[str], None] = _print, clock: Callable[[], float] = time.monotonic) -> None:
        self._tell, self._clock = tell, clock
        self._begun, self._told, self._untold = clock(), 0, 0

    def add(self, reason: str) -> None:
        """One more refusal."""
        now = self._clock()
        if now - self._begun > PERIOD_SECONDS:
            self._begun, self._told = now, 0
        if self._told >= TOLD_AT_ONCE:
            self._untold += 1
            return
        self._told += 1
        others = f" (and {self._untold:,} others before)" if self._untold else ""
        self._untold = 0
        self._tell(f"refused: {one_line(reason)}{others}")

    def close(self) -> None:
        """Tell of those that are counted and not told."""
        if self._untold:
            self._tell(f"refused: {self._untold:,} others")
            self._untold = 0


class Closable(Protocol):
    """A client's stream."""

    def finish(self) -> None:
        """End now."""
        ...


class Door:
    """Compares a caller with the rules. Each client has one name: its certificate's, its token's,
    or on loopback and in plain text the one that it says.
    """

    def __init__(self, rules: DoorRules, has_tls: bool, refusals: Refusals | None = None) -> None:
        self._rules, self._has_tls = rules, has_tls
        self._allowed = frozenset(rules.allowed) if rules.allowed is not None else None
        self._revoked = RevocationList(rules.revoked) if rules.revoked is not None else None
        if self._revoked is not None:
            self._revoked.read()
        self._certificates: dict[str, str] = {}
        """Fingerprint of the certificate that each client has last shown."""
        self.refusals = refusals or Refusals()

    def let_in(self, caller: Caller, client: str, token: str) -> None:
        """WireError, told in the log, for a caller who may not speak as `client`."""
        try:
            self.check(caller, client, token)
        except WireError as refusal:
            self.refusals.add(str(refusal))
            raise
        self._certificates[client] = fingerprint_of_peer(caller)

    def let_in_a_rank(self, caller: Caller) -> None:
        """The same for a rank, which has a secret and no name of its own."""
        try:
            self._check_certificate(caller)
        except WireError as refusal:
            self.refusals.add(str(refusal))
            raise

    def check(self, caller: Caller, client: str, token: str) -> None:
        """WireError with the reason, unless the caller may speak as `client`."""
        if not is_name(client):
            raise WireError(f"a client's name is up to {LONGEST_NAME} letters, digits and .-_@+; give it another --id")
        self._check_certificate(caller)
        if (expected := self._rules.tokens.get(client)) is not None:
            if not hmac.compare_digest(token.encode(), expected.encode()):
                raise WireError(f"client {client} is a process of this run's launcher; give this one another --id")
            return
        if self._has_tls and (name := name_of_peer(caller)) != client:
            raise WireError(f"client {client} shows the certificate of {name}; drop --id, or show its own certificate")
        if self._allowed is not None and client not in self._allowed:
            raise WireError(
                f"client {client} is not on the run's list of those who may join (clients.allowed); ask for it"
            )

    async def watch(self, streams: Mapping[str, Closable]) -> None:
        """End the streams of certificates that are revoked, as long as this runs."""
        while self._revoked is not None:
            await asyncio.sleep(REVOCATIONS_SECONDS)
            try:
                has_changed = self._revoked.read()
            except WireError as error:  # a half-written list: nobody new is let in meanwhile
                self.refusals.add(str(error))
                continue
            if has_changed:
                for client in [one for one in streams if self._revoked.holds(self._certificates.get(one, ""))]:
                    self.refusals.add(f"the certificate of {client} is revoked: its stream ends")
                    streams[client].finish()

    def _check_certificate(self, caller: Caller) -> None:
        if self._revoked is not None and self._revoked.holds(fingerprint_of_peer(caller)):
            raise WireError(f"the certificate of {name_of_peer(caller)} is revoked; ask the authority for a new one")
