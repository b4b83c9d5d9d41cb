"""An Endpoint in a process of its own, with the same methods: the body's process keeps its Python lock to itself.

The two processes speak over a socket pair: a head (JSON) and a serialized message at a time. The child ends when that
socket does, so it outlives nobody.
"""

from __future__ import annotations

import json
import math
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbert_ds.errors import WireError
from fedbert_ds.server.network.endpoint import Endpoint
from fedbert_ds.server.network.events import Connected, Disconnected, Event, JoinAbandoned, JoinAsked, Received
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.channel import TlsFiles
from fedbert_ds.wire.conversation import RECONNECT_SECONDS

UNREAD_BYTES = 256 << 20
"""Received bytes of all clients that may wait in the body's process; beyond them they wait in the child, by client."""

SOCKET_BYTES = 4 << 20
"""Asked of the system for the socket pair: a message or two."""

START_SECONDS = 60.0


class _Channel:
    """Heads and bodies over a socket; one thread at a time sends, one receives."""

    SIZES = struct.Struct("<IQ")

    def __init__(self, sock: socket.socket) -> None:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
        self._sock = sock

    def send(self, head: list[Any], body: bytes = b"") -> None:
        text = json.dumps(head).encode()
        self._sock.sendall(self.SIZES.pack(len(text), len(body)) + text)
        if body:
            self._sock.sendall(body)

    def receive(self) -> tuple[list[Any], bytes] | None:
        """The next one; None when the other side is gone."""
        try:
            sizes = self._read(self.SIZES.size)
            if len(sizes) < self.SIZES.size:
                return None
            head_bytes, body_bytes = self.SIZES.unpack(sizes)
            head, body = self._read(head_bytes), self._read(body_bytes)
        except ConnectionResetError:  # killed, with something of ours unread
            return None
        if len(head) < head_bytes or len(body) < body_bytes:
            return None
        return json.loads(head), body

    def close(self) -> None:
        self._sock.close()

    def _read(self, count: int) -> bytes:
        # The whole of it in one call, which holds no lock and makes no further copy.
        data = self._sock.recv(count, socket.MSG_WAITALL) if count else b""
        while data and len(data) < count:  # a signal came between
            more = self._sock.recv(count - len(data), socket.MSG_WAITALL)
            if not more:
                break
            data += more
        return data


class EndpointProcess:
    """Used as an Endpoint is: from one thread, from `start` to `stop`."""

    def __init__(
        self,
        host: str,
        port: int,
        tls: TlsFiles | None,
        reconnect_timeout: float = RECONNECT_SECONDS,
        shares_memory: bool = True,
    ) -> None:
        files = [str(path) for path in (tls.ca, tls.certificate, tls.key)] if tls else None
        self._start = ["start", host, port, files, reconnect_timeout, shares_memory]
        self._address = f"{host}:{port}"
        self._events: queue.SimpleQueue[tuple[Event | None, int]] = queue.SimpleQueue()
        self._commands: queue.SimpleQueue[tuple[list[Any], bytes] | None] = queue.SimpleQueue()
        self._joins: dict[int, JoinAsked] = {}
        self._admitted = threading.Event()
        self._room = threading.Condition()
        self._unread_bytes: float = 0
        self._clients: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []
        self._last_sent: tuple[pb.ServerMessage, bytes] | None = None
        self._up = self._down = 0
        self._taken = (0, 0)

    def start(self) -> int:
        """Start the process and listen; returns the port. Raises WireError when the port is taken."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "fedbert_ds.server.network.endpoint_process", str(theirs.fileno())]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        theirs.close()
        ours.settimeout(START_SECONDS)
        self._channel = _Channel(ours)
        self._channel.send(self._start)
        answer = self._channel.receive()
        ours.settimeout(None)
        if answer is None or answer[0][0] != "port":
            self._process.wait(timeout=START_SECONDS)
            raise WireError(answer[0][1] if answer else f"{self._address}: the endpoint's process did not start")
        for work in (self._receive, self._send):
            self._threads.append(threading.Thread(target=work, name="endpoint process", daemon=True))
            self._threads[-1].start()
        return int(answer[0][1])

    def admit(self, sessions: dict[str, str]) -> None:
        """From now on these clients may open a stream, each with its session; returns when the process knows."""
        self._admitted.clear()
        self._commands.put((["admit", sessions], b""))
        self._admitted.wait(START_SECONDS)

    def revoke(self, client: str) -> None:
        """A client that was dropped may not open another stream: it has missed steps of its half."""
        self._commands.put((["revoke", client], b""))

    def next_event(self, timeout: float) -> Event | None:
        """The oldest event, waiting up to `timeout` seconds for one. Raises WireError when the process is gone."""
        try:
            event, num_bytes = self._events.get(timeout=timeout) if timeout > 0 else self._events.get_nowait()
        except queue.Empty:
            return None
        if event is None:
            self._events.put((None, 0))
            raise WireError(f"{self._address}: the endpoint's process ended; look at its output")
        if num_bytes:
            with self._room:
                self._unread_bytes -= num_bytes
                self._room.notify()
        return event

    def send(self, client: str, message: pb.ServerMessage) -> None:
        """Queue a message for a client; messages to one that has gone are dropped."""
        if client in self._clients:
            self._commands.put((["send", client], self._body(message)))

    def close(self, client: str, last: pb.ServerMessage) -> None:
        """Send one last message, then end the client's stream."""
        if client in self._clients:
            self._clients.discard(client)
            self._commands.put((["close", client], self._body(last)))

    def take_bytes(self) -> tuple[int, int]:
        """Bytes received and given out to send since the last call; what was sent again counts once."""
        up, down = self._up, self._down
        taken = up - self._taken[0], down - self._taken[1]
        self._taken = up, down
        return taken

    def stop(self, grace: float = 5.0) -> None:
        """Let streams flush for up to `grace` seconds, stop listening and end the process; once is enough."""
        process, self._process = self._process, None
        if process is None:
            return
        with self._room:
            self._unread_bytes = -math.inf  # nobody reads any more, and `_receive` is to see the end
            self._room.notify()
        self._commands.put((["stop", grace], b""))
        self._commands.put(None)
        try:
            process.wait(timeout=grace + 30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for thread in self._threads:
            thread.join(timeout=10)

    def _body(self, message: pb.ServerMessage) -> bytes:
        # Serialized once for all its receivers: a half goes to many.
        if self._last_sent is None or self._last_sent[0] is not message:
            self._last_sent = message, message.SerializeToString()
        body = self._last_sent[1]
        self._down += len(body)
        return body

    def _send(self) -> None:
        try:
            while (command := self._commands.get()) is not None:
                self._channel.send(*command)
        except OSError:
            pass  # The process is gone: `_receive` tells.

    def _receive(self) -> None:
        while (received := self._channel.receive()) is not None:
            (kind, *arguments), body = received
            match kind:
                case "received":
                    message = pb.ClientMessage.FromString(body)
                    message.ClearField("delivery")
                    self._up += arguments[1]
                    with self._room:
                        self._room.wait_for(lambda: self._unread_bytes < UNREAD_BYTES)
                        self._unread_bytes += len(body)
                    self._events.put((Received(arguments[0], message), len(body)))
                case "admitted":
                    self._admitted.set()
                case "connected":
                    self._clients.add(arguments[0])
                    self._events.put((Connected(arguments[0]), 0))
                case "disconnected":
                    self._clients.discard(arguments[0])
                    self._events.put((Disconnected(arguments[0]), 0))
                case "join":
                    self._events.put((self._join(arguments[0], pb.Hello.FromString(body)), 0))
                case "abandoned":
                    asked = self._joins.pop(arguments[0], None)
                    if asked is not None:
                        asked.answer.cancel()
                        self._events.put((JoinAbandoned(asked.hello), 0))
        self._channel.close()
        self._admitted.set()
        self._events.put((None, 0))

    def _join(self, number: int, hello: pb.Hello) -> JoinAsked:
        asked = self._joins[number] = JoinAsked(hello, Future())

        def answer(outcome: Future[pb.Welcome]) -> None:
            self._joins.pop(number, None)
            if outcome.cancelled():
                return
            error = outcome.exception()
            if error is None:
                self._commands.put((["welcome", number], outcome.result().SerializeToString()))
            else:
                self._commands.put((["refuse", number, str(error)], b""))

        asked.answer.add_done_callback(answer)
        return asked


# -- in the child ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """A message of a connected client, as it came."""

    client: str
    frame: bytes
    num_bytes: int
    """Of the message in it."""


class _ChildEndpoint(Endpoint):
    def _received(self, client: str, message: pb.ClientMessage, frame: bytes, num_bytes: int) -> _Frame:  # type: ignore[override]
        return _Frame(client, frame, num_bytes)


class _Child:
    """The endpoint, what is asked of it, and what it has to tell."""

    def __init__(self, channel: _Channel, endpoint: Endpoint) -> None:
        self._channel = channel
        self._sending = threading.Lock()
        self._endpoint = endpoint
        self._joins: dict[int, JoinAsked] = {}
        self._is_over = threading.Event()

    def obey(self) -> None:
        """Carry out commands until the body's process wants no more, or is gone."""
        grace = 0.0
        while (received := self._channel.receive()) is not None:
            (kind, *arguments), body = received
            match kind:
                case "send":
                    self._endpoint.send_body(arguments[0], body)
                case "close":
                    self._endpoint.close_body(arguments[0], body)
                case "admit":
                    self._endpoint.admit(arguments[0])
                    self._send(["admitted"])
                case "revoke":
                    self._endpoint.revoke(arguments[0])
                case "welcome" | "refuse" if arguments[0] in self._joins:
                    answer = self._joins.pop(arguments[0]).answer
                    with suppress(InvalidStateError):  # it has just gone away
                        if kind == "welcome":
                            answer.set_result(pb.Welcome.FromString(body))
                        else:
                            answer.set_exception(WireError(arguments[1]))
                case "stop":
                    grace = arguments[0]
                    break
        self._endpoint.stop(grace)
        self._is_over.set()

    def _send(self, head: list[Any], body: bytes = b"") -> None:
        with self._sending:
            self._channel.send(head, body)

    def tell(self) -> None:
        """Hand events on until the end."""
        while not self._is_over.is_set():
            match self._endpoint.next_event(0.2):
                case _Frame(client, frame, num_bytes):
                    self._send(["received", client, num_bytes], frame)
                case Connected(client):
                    self._send(["connected", client])
                case Disconnected(client):
                    self._send(["disconnected", client])
                case JoinAsked() as asked:
                    self._joins[id(asked.hello)] = asked
                    self._send(["join", id(asked.hello)], asked.hello.SerializeToString())
                case JoinAbandoned(hello):
                    self._joins.pop(id(hello), None)
                    self._send(["abandoned", id(hello)])


def _main(descriptor: int) -> None:
    # The body's process decides when it is over: it saves first.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    channel = _Channel(socket.socket(fileno=descriptor))
    request = channel.receive()
    if request is None:
        return
    _, host, port, files, reconnect_timeout, shares_memory = request[0]
    tls = TlsFiles(*map(Path, files)) if files else None
    endpoint = _ChildEndpoint(host, port, tls, reconnect_timeout, shares_memory)
    try:
        channel.send(["port", endpoint.start()])
    except WireError as error:
        channel.send(["error", str(error)])
        endpoint.stop(0.0)
        return
    child = _Child(channel, endpoint)
    teller = threading.Thread(target=child.tell, daemon=True)
    teller.start()
    child.obey()


if __name__ == "__main__":
    _main(int(sys.argv[1]))
