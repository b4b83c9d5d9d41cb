"""A rank's messages to its clients, compressed and sent by threads beside the body."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from fedbert_ds.errors import NotFinite
from fedbert_ds.wire import fedbert_pb2 as pb


class Sends(Protocol):
    """What an outbox needs of an endpoint; the methods are a RankEndpoint's."""

    def send(self, client: str, message: pb.ServerMessage) -> None:
        """Queue a message for a client; messages to one that is gone are dropped."""
        ...

    def close(self, client: str, last: pb.ServerMessage) -> None:
        """Send one last message, then end the client's stream."""
        ...

    def take_bytes(self) -> tuple[int, int]:
        """Bytes received and bytes queued to send since the last call."""
        ...


class Outbox:
    """Messages leave in the order of the calls. Used from one thread.

    A thread sends them; `threads` others compress. An error in one of them is raised by a later
    call, at the latest by `settle`. Results of the body that are not finite are not sent;
    `take_unsound` tells of them.
    """

    def __init__(self, endpoint: Sends, threads: int = 1) -> None:
        self._endpoint = endpoint
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="outbox")
        self._framing = ThreadPoolExecutor(threads, thread_name_prefix="framing")
        self._counting = threading.Lock()
        """Held while a message is sent and counted, so that `take_bytes` sees both or neither."""
        self._update_bytes = self._held_out_bytes = 0
        """Sent since the last `take_bytes`."""
        self._failure: BaseException | None = None
        self._unsound: list[tuple[str, NotFinite]] = []

    def send(self, client: str, message: pb.ServerMessage) -> None:
        """Send a message that needs no encoding."""
        self._put(self._send, (client,), lambda: (message,))

    def send_framed(self, client: str, make: Callable[[], pb.ServerMessage]) -> None:
        """Send the message that `make` frames, beside others that are framed."""
        self._put(self._send_one, client, self._framing.submit(make))

    def send_coded(self, clients: Sequence[str], make: Callable[[], Iterable[pb.ServerMessage]]) -> None:
        """Send each of these clients the messages that `make` encodes, one at a time."""
        self._put(self._send, tuple(clients), make)

    def close(self, client: str, last: pb.ServerMessage) -> None:
        """Send one last message, then end the client's stream."""
        self._put(self._endpoint.close, client, last)

    def check(self) -> None:
        """Raise the thread's first error, if there was one."""
        if self._failure is not None:
            raise self._failure

    def take_unsound(self) -> list[tuple[str, NotFinite]]:
        """Clients whose results were not finite, since the last call."""
        with self._counting:
            unsound, self._unsound = self._unsound, []
        return unsound

    def settle(self) -> None:
        """Wait until the endpoint has every message; raises as `check`."""
        self._thread.submit(lambda: None).result()
        self.check()

    def take_bytes(self) -> tuple[int, int, int, int]:
        """Bytes received and sent since the last call; of those sent, what was updates or a
        reference, and what was of evaluations.
        """
        with self._counting:
            up, down = self._endpoint.take_bytes()
            updates, self._update_bytes = self._update_bytes, 0
            held_out, self._held_out_bytes = self._held_out_bytes, 0
        return up, down, updates, held_out

    def _put(self, work: Callable[..., None], *arguments: Any) -> None:
        self.check()
        self._thread.submit(self._attempt, work, *arguments)
        self.check()

    # -- in the thread -----------------------------------------------------------------------------

    def _attempt(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            self._failure = self._failure or error

    def _send_one(self, client: str, framed: Future[pb.ServerMessage]) -> None:
        try:
            message = framed.result()
        except NotFinite as error:
            with self._counting:
                self._unsound.append((client, error))
            return
        self._send((client,), lambda: (message,))

    def _send(self, clients: Sequence[str], make: Callable[[], Iterable[pb.ServerMessage]]) -> None:
        for message in make():
            with self._counting:
                for client in clients:
                    self._endpoint.send(client, message)
                if message.HasField("update") or message.HasField("reference"):
                    self._update_bytes += message.ByteSize() * len(clients)
                if message.HasField("hidden") and message.hidden.held_out:
                    self._held_out_bytes += message.ByteSize() * len(clients)
