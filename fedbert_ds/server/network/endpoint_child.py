"""The child of an EndpointProcess: a Listener that takes commands and reports events over a socket.

It ends when the socket does, so it outlives nobody. It imports no torch: that alone takes seconds.
"""

from __future__ import annotations

import signal
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbert_ds.errors import WireError
from fedbert_ds.server.network.client_stream import ClientStream
from fedbert_ds.server.network.door import DoorRules
from fedbert_ds.server.network.events import (
    POLL_SECONDS,
    Attached,
    Connected,
    Detached,
    Disconnected,
    JoinAbandoned,
    JoinAsked,
    reply,
)
from fedbert_ds.server.network.handshakes import tell_failed_handshakes
from fedbert_ds.server.network.listener import Listener
from fedbert_ds.server.network.socket_channel import SocketChannel
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.channel import TlsFiles


@dataclass(frozen=True)
class ReceivedFrame:
    """A message of a connected client, as it came: the other process parses it."""

    client: str
    session: str
    frame: bytes
    num_bytes: int
    """Size of the message without its delivery."""


def received_frame(stream: ClientStream, message: pb.ClientMessage, frame: bytes, num_bytes: int) -> ReceivedFrame:
    """The event that the listener makes of a message."""
    return ReceivedFrame(stream.client, stream.session, frame, num_bytes)


class EndpointChild:
    """Ties a listener to the process that started it: one thread runs `obey`, another `tell`."""

    def __init__(self, channel: SocketChannel, listener: Listener[ReceivedFrame]) -> None:
        self._channel = channel
        self._sending = threading.Lock()
        self._listener = listener
        self._joins: dict[int, JoinAsked] = {}
        """By the id of their Hello, which is their number in the other process."""
        self._is_over = threading.Event()

    def obey(self) -> None:
        """Carry out commands until the other process wants no more, or is gone."""
        grace = 0.0
        while (received := self._channel.receive()) is not None:
            (kind, *arguments), body = received
            match kind, arguments:
                case "send", [client]:
                    self._listener.send_body(client, body)
                case "close", [client]:
                    self._listener.close_body(client, body)
                case "admit", [sessions]:
                    self._listener.admit(sessions)
                    self._send("admitted")
                case "keep_at_most", [num_bytes]:
                    self._listener.keep_at_most(num_bytes)
                case "revoke", [client]:
                    self._listener.revoke(client)
                case "welcome", [number]:
                    self._reply(number, pb.Welcome.FromString(body))
                case "refuse", [number, reason]:
                    self._reply(number, WireError(reason))
                case "stop", [seconds]:
                    grace = seconds
                    break
        self._listener.stop(grace)
        self._is_over.set()

    def tell(self) -> None:
        """Report events until the end."""
        while not self._is_over.is_set():
            match self._listener.next_event(POLL_SECONDS):
                case ReceivedFrame(client, session, frame, num_bytes):
                    self._send("received", client, session, num_bytes, body=frame)
                case Connected(client, session):
                    self._send("connected", client, session)
                case Detached(client, session):
                    self._send("detached", client, session)
                case Attached(client, session):
                    self._send("attached", client, session)
                case Disconnected(client, reason, session):
                    self._send("disconnected", client, session, reason)
                case JoinAsked(hello) as asked:
                    self._joins[id(hello)] = asked
                    self._send("join", id(hello), body=hello.SerializeToString())
                case JoinAbandoned(hello):
                    self._joins.pop(id(hello), None)
                    self._send("abandoned", id(hello))

    def _reply(self, number: int, outcome: pb.Welcome | WireError) -> None:
        asked = self._joins.pop(number, None)
        if asked is not None:  # else the client has just gone away
            reply(asked.answer, outcome)

    def _send(self, *head: Any, body: bytes = b"") -> None:
        with self._sending, suppress(OSError):  # the other process is gone: `obey` ends
            self._channel.send(list(head), body)


def main(descriptor: int) -> None:
    """Listen as the first item on this socket says, until the other process stops or is gone."""
    # The other process decides when it is over: it saves first.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    channel = SocketChannel(socket.socket(fileno=descriptor))
    request = channel.receive()
    if request is None:
        return
    _, host, port, files, reconnect_timeout, shares_memory, rules = request[0]
    tls = TlsFiles(*map(Path, files)) if files else None
    if tls is not None:
        tell_failed_handshakes()
    listener = Listener(host, port, tls, reconnect_timeout, shares_memory, received_frame, DoorRules.from_json(rules))
    try:
        channel.send(["port", listener.start()])
    except WireError as error:
        channel.send(["error", str(error)])
        listener.stop(0.0)
        return
    child = EndpointChild(channel, listener)
    threading.Thread(target=child.tell, daemon=True).start()
    child.obey()


if __name__ == "__main__":
    main(int(sys.argv[1]))
