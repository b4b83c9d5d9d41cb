"""What a rank hears from its clients, and what it needs of the endpoint that they dial."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from fedbert_ds.errors import WireError
from fedbert_ds.wire import fedbert_pb2 as pb

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
    """A client opened its training stream with a valid session."""

    client: str
    session: str = ""


@dataclass(frozen=True)
class Received:
    """A message of a connected client."""

    client: str
    message: pb.ClientMessage
    session: str = ""


@dataclass(frozen=True)
class Disconnected:
    """A client left or did not reconnect in time. A stream that `close` ends causes no event."""

    client: str
    reason: str = ""
    """Why the endpoint ended its stream, if it did."""
    session: str = ""


@dataclass(frozen=True)
class Detached:
    """A client's connection is lost; it has a while to come back."""

    client: str
    session: str = ""


@dataclass(frozen=True)
class Attached:
    """A client whose connection was lost is back, with the stream it had."""

    client: str
    session: str = ""


@dataclass(frozen=True)
class Knocked:
    """Somebody waits at the coordinator to join as this client."""

    client: str


Event = JoinAsked | JoinAbandoned | Connected | Received | Detached | Attached | Disconnected


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
        """Listen; returns the port. WireError if it is in use, or the host not this machine's."""
        ...

    def admit(self, sessions: dict[str, str]) -> None:
        """Let these clients open a training stream, too, each with its session, from now on. A
        stream that one of them has with another session ends.
        """
        ...

    def revoke(self, client: str) -> None:
        """Let a client open no further stream with the session it has."""
        ...

    def keep_at_most(self, num_bytes: int) -> None:
        """Keep at most so many bytes for a client that comes from now on; one that leaves more of
        them unread is disconnected.
        """
        ...

    def next_event(self, timeout: float) -> Event | None:
        """The oldest event, waiting up to `timeout` s for one. WireError if the endpoint died."""
        ...

    def send(self, client: str, message: pb.ServerMessage) -> None:
        """Queue a message for a client; messages to one that is gone are dropped."""
        ...

    def close(self, client: str, last: pb.ServerMessage) -> None:
        """Send one last message, then end the client's stream."""
        ...

    def take_bytes(self) -> tuple[int, int]:
        """Bytes received and bytes queued to send since the last call.

        A message that is sent again after a lost connection counts once.
        """
        ...

    def stop(self, grace: float = 5.0) -> None:
        """Let streams flush for up to `grace` seconds, stop listening. Further calls do nothing."""
        ...
