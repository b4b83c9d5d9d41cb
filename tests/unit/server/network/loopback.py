"""A started endpoint, and streams that clients open to it over loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fedbert_ds.errors import WireError
from fedbert_ds.server.network.door import DoorRules
from fedbert_ds.server.network.endpoint import Endpoint
from fedbert_ds.server.network.endpoint_process import EndpointProcess
from fedbert_ds.server.network.events import Event
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.channel import TlsFiles
from fedbert_ds.wire.stream import ServerStream

TIMEOUT = 20.0
KINDS = [Endpoint, EndpointProcess]


class Listening:
    """A started endpoint and its address."""

    def __init__(
        self,
        tls: TlsFiles | None = None,
        kind: type[Endpoint | EndpointProcess] = Endpoint,
        rules: DoorRules | None = None,
    ) -> None:
        self.real = kind("127.0.0.1", 0, tls, rules=rules)
        self.port = self.real.start()
        self.address = f"127.0.0.1:{self.port}"

    def event(self) -> Event:
        event = self.real.next_event(TIMEOUT)
        assert event is not None, "no event came"
        return event

    def no_event(self) -> None:
        assert self.real.next_event(0.2) is None


@contextmanager
def listening(
    kind: type[Endpoint | EndpointProcess] = Endpoint, tls: TlsFiles | None = None, rules: DoorRules | None = None
) -> Iterator[Listening]:
    """An endpoint that admits ada and bo, with the sessions that `Stream` gives them."""
    started = Listening(tls, kind, rules)
    started.real.admit({name: session_of(name) for name in ("ada", "bo")})
    yield started
    started.real.stop(grace=0.1)


class Stream(ServerStream):
    """A client's training stream, driven by a test."""

    def __init__(
        self, address: str, client: str, session: str | None = None, tls: TlsFiles | None = None, token: str = ""
    ) -> None:
        # Not through memory: what these tests break is the socket.
        super().__init__(
            address,
            tls,
            client,
            session_of(client) if session is None else session,
            reconnect_timeout=TIMEOUT,
            shares_memory=False,
            token=token,
        )
        self.__enter__()

    def refusal(self) -> str:
        with pytest.raises(WireError) as caught:
            self.receive()
        return str(caught.value).removeprefix("the server refused this client: ")

    def end(self) -> None:
        """The client is done."""
        self.__exit__()


def session_of(client: str) -> str:
    return f"session of {client}"


def manifest(window: int) -> pb.ClientMessage:
    return pb.ClientMessage(manifest=pb.Manifest(window=window))


def save(window: int) -> pb.ServerMessage:
    return pb.ServerMessage(save=pb.Save(window=window))
