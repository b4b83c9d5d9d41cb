"""What a rank hears from its clients, and what it needs of the endpoint that they dial."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fedbert_ds.errors import WireError
from fedbert_ds.wire import fedbert_pb2 as pb

if TYPE_CHECKING:
    POLL_SECONDS = 0.2
"""How long a wait for an event lasts before clocks and flags are looked at again."""


@dataclass(frozen=True)
class JoinAsked:
    """A client called Join. `reply` answers it."""

    hello: pb.Hello
    answer: Future[pb.Welcome]


@dataclass(frozen=True)
class JoinAbandoned:
    """A client went away while its Join waited for an answer."""

    hello: pb.Hello


@dataclass(frozen=True)
class Connected:
    """A client opened its training stream with a valid session. A reconnect is no event."""

    client: str


@dataclass(frozen=True)
class Received:
    """A message of a connected client."""

    client: str
    message: pb.ClientMessage


@dataclass(frozen=True)
class Disconnected:
    """A client's stream ended because the client left or did not reconnect in time. `close` causes no such event."""

    client: str


Event = JoinAsked | JoinAbandoned | Connected | Received | Disconnected


def reply(answer: Future[pb.Welcome], outcome: pb.Welcome | WireError) -> None:
    """Answer a Join, unless it has its answer or the client went away while it waited."""
    with suppress(InvalidStateError):
        if isinstance(outcome, WireError):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)


class RankEndpoint(Protocol):
    """What a rank needs of the endpoint its clients dial: events come out, messages go in.

    Used from one thread, from `start` to `stop`.
    """

    def start(self) -> int:
        """Listen; returns the port. Raises WireError when the port is in use or the host is not this machine's."""
        ...

    def admit(self, sessions: dict[str, str]) -> None:
        """Let these clients, and no others, open a training stream, each with its session. Takes effect at once."""
        ...

    def revoke(self, client: str) -> None:
        """Let a client open no further stream: it has missed steps of its half."""
        ...

    def next_event(self, timeout: float) -> Event | None:
        """The oldest event, waiting up to `timeout` seconds for one. Raises WireError when the endpoint is gone."""
        ...

    def send(self, client: str, message: pb.ServerMessage) -> None:
        """Queue a message for a client; messages to one that is gone are dropped."""
        ...

    def close(self, client: str, last: pb.ServerMessage) -> None:
        """Send one last message, then end the client's stream."""
        ...

    def take_bytes(self) -> tuple[int, int]:
        """Bytes received and bytes queued to send since the last call; a message that is sent again counts once."""
        ...

    def stop(self, grace: float = 5.0) -> None:
        """Let streams flush for up to `grace` seconds and stop listening. Further calls do nothing."""
        ...
