"""Which events count: those of the session that a client was given last."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from fedbert_ds.server.network.decoding import Decoded
from fedbert_ds.server.network.events import Attached, Connected, Detached, Disconnected, Knocked, Received
from fedbert_ds.server.network.sessions import Sessions, counts
from fedbert_ds.wire import fedbert_pb2 as pb

MESSAGE = pb.ClientMessage()


class FakeEndpoint:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def admit(self, sessions: dict[str, str]) -> None:
        self.told.append(dict(sessions))

    def revoke(self, client: str) -> None:
        self.told.append(client)


def of(session: str) -> list[Any]:
    """Every kind of event of a session."""
    return [
        Connected("bo", session), Received("bo", MESSAGE, session), Decoded("bo", MESSAGE, None, session),
        Detached("bo", session), Attached("bo", session), Disconnected("bo", "", session),
    ]  # fmt: skip


@pytest.mark.parametrize("event", of("first"))
def test_an_event_counts_in_its_own_session_alone(event: Any) -> None:
    assert counts(event, {"bo": "first"})
    assert not counts(event, {"bo": "second", "ada": "first"}) and not counts(event, {})


@pytest.mark.parametrize("event", [Knocked("bo"), None])
def test_what_has_no_session_counts(event: Any) -> None:
    assert counts(event, {})


def test_what_an_earlier_process_left_behind_is_not_heard() -> None:
    """It came, spoke and went while the rank was busy, and the next one was let in."""
    endpoint: Any = FakeEndpoint()
    sessions = Sessions(endpoint)
    waiting: deque[Any] = deque([*of("first"), Knocked("bo"), *of("second"), *of("first"), None])
    take = sessions.heard(lambda timeout: waiting.popleft())
    sessions.admit({"ada": "hers", "bo": "first"})
    assert take(0) == Connected("bo", "first")
    sessions.admit({"bo": "second"})
    assert [take(0) for _ in range(8)] == [Knocked("bo"), *of("second"), None]
    waiting.extend([*of("second"), Connected("ada", "hers")])
    sessions.revoke("bo")
    assert take(0) == Connected("ada", "hers"), "nothing is heard of who has no session"
    assert endpoint.told == [{"ada": "hers", "bo": "first"}, {"bo": "second"}, "bo"]
