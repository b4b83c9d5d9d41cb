"""The session that each client was given last: what is heard of an earlier one does not count.

Events wait to be taken. Meanwhile a client's process may end and its next one be let in, and what
the earlier one said, or that it was lost, must not be taken for the next one's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedbert_ds.server.network.decoding import DecodedEvent
from fedbert_ds.server.network.events import RankEndpoint

LEFT_OVER_AT_ONCE = 100
"""Events that do not count are passed over in one go; the body must not wait for more."""
TakeEvent = Callable[[float], DecodedEvent | None]
"""Given seconds, returns the next event, or None."""


def counts(event: Any, sessions: Mapping[str, str]) -> bool:
    """Whether an event is of the session that its client has; one that has no session always is."""
    session = getattr(event, "session", None)
    return session is None or sessions.get(event.client) == session


class Sessions:
    """Those that a rank's clients have at its endpoint. Used from the rank's thread."""

    def __init__(self, endpoint: RankEndpoint) -> None:
        self._endpoint = endpoint
        self._sessions: dict[str, str] = {}

    def admit(self, sessions: dict[str, str]) -> None:
        """Let these clients open a stream, too, each with its session; its earlier one is over."""
        self._sessions.update(sessions)
        self._endpoint.admit(sessions)

    def revoke(self, client: str) -> None:
        """A client has no session any more."""
        self._sessions.pop(client, None)
        self._endpoint.revoke(client)

    def heard(self, take_event: TakeEvent) -> TakeEvent:
        """`take_event` without events that do not count; None, too, after very many of them."""

        def take(timeout: float) -> DecodedEvent | None:
            for _ in range(LEFT_OVER_AT_ONCE):
                event = take_event(timeout)
                if event is None or counts(event, self._sessions):
                    return event
            return None

        return take
