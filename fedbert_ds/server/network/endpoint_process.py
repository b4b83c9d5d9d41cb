"""An Endpoint in a process of its own: the body's process keeps its Python lock to itself."""

from __future__ import annotations

import math
import os
import queue
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from fedbert_ds.errors import WireError
from fedbert_ds.server.network.door import DoorRules
from fedbert_ds.server.network.events import (
    Attached,
    Connected,
    Detached,
    Disconnected,
    Event,
    JoinAbandoned,
    JoinAsked,
    Received,
)
from fedbert_ds.server.network.socket_channel import SocketChannel
from fedbert_ds.server.network.traffic import Traffic
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.channel import TlsFiles
from fedbert_ds.wire.conversation import RECONNECT_SECONDS
from fedbert_ds.wire.host_port import host_port
from fedbert_ds.wire.verbosity import tell_of_handshakes

UNREAD_BYTES = 256 << 20
"""Received bytes of all clients that may wait in this process; more wait in the child."""

START_SECONDS = 60.0
"""How long the child may take to listen, and to answer `admit`."""


class EndpointProcess:
    """A RankEndpoint that listens in a child process (`endpoint_child`), which outlives nobody."""

    def __init__(
        self,
        host: str,
        port: int,
        tls: TlsFiles | None,
        reconnect_timeout: float = RECONNECT_SECONDS,
        shares_memory: bool = True,
        rules: DoorRules | None = None,
    ) -> None:
        files = [str(path) for path in (tls.ca, tls.certificate, tls.key)] if tls else None
        self._start = ["start", host, port, files, reconnect_timeout, shares_memory, (rules or DoorRules()).to_json()]
        self._address, self._has_tls = host_port(host, port), tls is not None
        self._events: queue.SimpleQueue[tuple[Event | None, int]] = queue.SimpleQueue()
        """Events, each with the bytes that wait with it; None after the last."""
        self._commands: queue.SimpleQueue[tuple[list[Any], bytes] | None] = queue.SimpleQueue()
        self._joins: dict[int, JoinAsked] = {}
        self._admitted = threading.Event()
        self._is_over = False
        """The child is gone."""
        self._room = threading.Condition()
        self._unread_bytes: float = 0
        self._clients: set[str] = set()
        self._traffic = Traffic()
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []

    def start(self) -> int:
        """Start the child, which listens; returns the port. WireError when the port is in use."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "fedbert_ds.server.network.endpoint_child", str(theirs.fileno())]
        environment = dict(os.environ)
        if self._has_tls:
            tell_of_handshakes(environment)
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "pass_fds": [theirs.fileno()]}
        self._process = subprocess.Popen(command, env=environment, **pipes)
        theirs.close()
        self._channel = SocketChannel(ours)
        ours.settimeout(START_SECONDS)
        with suppress(OSError):  # it did not start: there is no answer
            self._channel.send(self._start)
        answer = self._channel.receive()
        ours.settimeout(None)
        if answer is None or answer[0][0] != "port":
            self._channel.close()
            self.stop(grace=0.0)
            raise WireError(
                answer[0][1] if answer else f"{self._address}: the endpoint's process did not start; see its output"
            )
        for work in (self._receive, self._send):
            self._threads.append(threading.Thread(target=work, name="endpoint process", daemon=True))
            self._threads[-1].start()
        return int(answer[0][1])

    def admit(self, sessions: dict[str, str]) -> None:
        """Let these clients open a stream, too, each with its session; returns when it is so."""
        self._admitted.clear()
        self._command("admit", sessions)
        if not self._is_over:  # `next_event` raises then
            self._admitted.wait(START_SECONDS)

    def revoke(self, client: str) -> None:
        """Let a client open no further stream."""
        self._command("revoke", client)

    def keep_at_most(self, num_bytes: int) -> None:
        """Keep at most so many bytes for a client that comes from now on."""
        self._command("keep_at_most", num_bytes)

    def next_event(self, timeout: float) -> Event | None:
        """The oldest event, waiting up to `timeout` s for one. WireError when the child is gone."""
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

    @property
    def num_waiting(self) -> int:
        """Events that wait for `next_event`."""
        return self._events.qsize()

    def send(self, client: str, message: pb.ServerMessage) -> None:
        """Queue a message for a client; messages to one that is gone are dropped."""
        if client in self._clients:
            self._command("send", client, body=self._traffic.serialize(message))

    def close(self, client: str, last: pb.ServerMessage) -> None:
        """Send one last message, then end the client's stream."""
        if client in self._clients:
            self._clients.discard(client)
            self._command("close", client, body=self._traffic.serialize(last))

    def take_bytes(self) -> tuple[int, int]:
        """Bytes received and bytes queued to send since the last call."""
        return self._traffic.take()

    def stop(self, grace: float = 5.0) -> None:
        """Let streams flush for up to `grace` seconds, end the child. Further calls do nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        with self._room:
            # Nobody takes events any more, and `_receive` must read on to the end.
            self._unread_bytes = -math.inf
            self._room.notify()
        self._command("stop", grace)
        self._commands.put(None)
        try:
            process.wait(timeout=grace + 30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for thread in self._threads:
            thread.join(timeout=10)

    def _command(self, *head: Any, body: bytes = b"") -> None:
        self._commands.put((list(head), body))

    # -- in threads of their own -------------------------------------------------------------------

    def _send(self) -> None:
        with suppress(OSError):  # the child is gone: `_receive` tells
            while (command := self._commands.get()) is not None:
                self._channel.send(*command)

    def _receive(self) -> None:
        while (received := self._channel.receive()) is not None:
            (kind, *arguments), body = received
            match kind, arguments:
                case "received", [client, session, num_bytes]:
                    self._traffic.count_up(num_bytes)
                    message = pb.ClientMessage.FromString(body)
                    message.ClearField("delivery")
                    self._wait_for_room(len(body))
                    self._events.put((Received(client, message, session), len(body)))
                case "connected", [client, session]:
                    self._clients.add(client)
                    self._events.put((Connected(client, session), 0))
                case "detached", [client, session]:
                    self._events.put((Detached(client, session), 0))
                case "attached", [client, session]:
                    self._events.put((Attached(client, session), 0))
                case "disconnected", [client, session, reason]:
                    self._clients.discard(client)
                    self._events.put((Disconnected(client, reason, session), 0))
                case "join", [number]:
                    self._events.put((self._join(number, pb.Hello.FromString(body)), 0))
                case "abandoned", [number]:
                    asked = self._joins.pop(number, None)
                    if asked is not None:
                        asked.answer.cancel()
                        self._events.put((JoinAbandoned(asked.hello), 0))
                case "admitted", []:
                    self._admitted.set()
        self._channel.close()
        self._is_over = True
        self._admitted.set()
        self._events.put((None, 0))

    def _wait_for_room(self, num_bytes: int) -> None:
        with self._room:
            self._room.wait_for(lambda: self._unread_bytes < UNREAD_BYTES)
            self._unread_bytes += num_bytes

    def _join(self, number: int, hello: pb.Hello) -> JoinAsked:
        """A Join whose answer goes to the child, by its number."""
        asked = self._joins[number] = JoinAsked(hello, Future())

        def answer(outcome: Future[pb.Welcome]) -> None:
            self._joins.pop(number, None)
            if outcome.cancelled():
                return
            error = outcome.exception()
            if error is None:
                self._command("welcome", number, body=outcome.result().SerializeToString())
            else:
                self._command("refuse", number, str(error))

        asked.answer.add_done_callback(answer)
        return asked
