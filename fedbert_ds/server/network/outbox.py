"""Messages on their way to a rank's clients: a thread codes them and hands them to the endpoint, beside the body."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fedbert_ds.server.network.events import RankEndpoint
from fedbert_ds.wire import fedbert_pb2 as pb


class Outbox:
    """Used from one thread; messages leave in the order in which they were put.

    What coding them raises, a WireError for values that are not finite, is raised by a later call: at the latest by
    `settle`.
    """

    def __init__(self, endpoint: RankEndpoint) -> None:
        self._endpoint = endpoint
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="outbox")
        self._counting = threading.Lock()
        """Held while a message is handed over and counted, so that no count is of one and not of the other."""
        self._half_bytes = self._half_bytes_taken = 0
        self._failure: BaseException | None = None

    def send(self, client: str, message: pb.ServerMessage) -> None:
        """A message that needs no coding."""
        self._put(self._send, (client,), lambda: (message,))

    def send_coded(self, clients: Sequence[str], make: Callable[[], Iterable[pb.ServerMessage]]) -> None:
        """Messages to each of these clients, made by the thread."""
        self._put(self._send, tuple(clients), make)

    def close(self, client: str, last: pb.ServerMessage) -> None:
        """Send one last message, then end the client's stream."""
        self._put(self._endpoint.close, client, last)

    def check(self) -> None:
        """Raise what coding has raised."""
        if self._failure is not None:
            raise self._failure

    def settle(self) -> None:
        """Wait until the endpoint has everything that was put."""
        self._thread.submit(lambda: None).result()
        self.check()

    def take_bytes(self) -> tuple[int, int, int]:
        """Bytes since the last call: received, given out to send, and those of halves among the latter."""
        with self._counting:
            up, down = self._endpoint.take_bytes()
            halves = self._half_bytes - self._half_bytes_taken
            self._half_bytes_taken = self._half_bytes
        return up, down, halves

    def _put(self, work: Callable[..., None], *arguments: Any) -> None:
        self.check()
        self._thread.submit(self._attempt, work, *arguments)
        self.check()

    # -- in the thread ----------------------------------------------------------------------------------------------

    def _attempt(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            self._failure = self._failure or error

    def _send(self, clients: Sequence[str], make: Callable[[], Iterable[pb.ServerMessage]]) -> None:
        for message in make():
            with self._counting:
                for client in clients:
                    self._endpoint.send(client, message)
                if message.HasField("update"):
                    self._half_bytes += message.ByteSize() * len(clients)
