"""A client's two conversations where another party is the aggregator: which message is whose.

Client updates go to the aggregator and nothing else does; the client model comes from it alone.
"""

from __future__ import annotations

import queue
import threading
from typing import Protocol

from fedbert_ds.errors import WireError
from fedbert_ds.federation.strategy import Strategy
from fedbert_ds.wire import fedbert_pb2 as pb

OF_AGGREGATOR = frozenset({"update", "reference", "update_request"})
"""Kinds of messages about the client model, which only the aggregator sends."""
OF_BOTH = frozenset({"finish", "refused"})
"""The server's word ends the run. The aggregator's `finish` says that it is gone."""

UNHANDLED = 8
"""Messages of one party that may wait here; more wait in its stream, which slows it down."""

LAST_WORD_SECONDS = 30.0
"""Wait for the server's last word after the aggregator is lost: the server ends the run."""


class Stream(Protocol):
    """One conversation."""

    def send(self, message: pb.ClientMessage) -> None:
        """Queue a message."""
        ...

    def receive(self) -> pb.ServerMessage:
        """Wait for the next message; WireError with the reason once the stream has ended."""
        ...


class Parties:
    """Sends and receives as one stream. Both belong to one thread; a thread per party listens.

    A save must find the half with the steps of all windows before it. In one stream the order of
    messages sees to that; here a request to save waits for the combined updates before it.
    """

    def __init__(self, server: Stream, aggregator: Stream, strategy: Strategy, first_window: int) -> None:
        self._server, self._aggregator = server, aggregator
        self._strategy = strategy
        self._next_update = first_window
        """Combined updates of all windows before this one have been handed on."""
        self._postponed: list[pb.ServerMessage] = []
        """Requests to save that came too early."""
        self._aggregator_lost: WireError | None = None
        self._arrived: queue.SimpleQueue[tuple[Stream, pb.ServerMessage | WireError]] = queue.SimpleQueue()
        for stream in (server, aggregator):
            room = threading.Semaphore(UNHANDLED)
            threading.Thread(target=self._listen, args=(stream, room), daemon=True).start()
            if stream is server:
                self._server_room = room
            else:
                self._aggregator_room = room

    def send(self, message: pb.ClientMessage) -> None:
        """Send a message to the party that it is for."""
        (self._aggregator if message.HasField("update") else self._server).send(message)

    def receive(self) -> pb.ServerMessage:
        """Wait for the next message of either party.

        Raises WireError once the server's stream has ended, or the aggregator's and the server says
        nothing more; and for a message that is not the sender's to send.
        """
        while True:
            if self._postponed and self._may_save(self._postponed[0]):
                return self._postponed.pop(0)
            try:
                party, message = self._arrived.get(timeout=LAST_WORD_SECONDS if self._aggregator_lost else None)
            except queue.Empty:
                assert self._aggregator_lost is not None
                raise self._aggregator_lost from None
            if isinstance(message, WireError):
                if party is self._server:
                    raise message
                self._aggregator_lost = message
                continue
            (self._server_room if party is self._server else self._aggregator_room).release()
            kind = message.WhichOneof("body")
            self._check(party, kind)
            if kind == "finish" and party is self._aggregator:
                self._aggregator_lost = WireError(f"the aggregator ended its stream: {message.finish.reason}")
                continue
            if kind == "update" and message.update.last:
                self._next_update = message.update.window + 1
            if kind == "save" and not self._may_save(message):
                self._postponed.append(message)
                continue
            return message

    def _check(self, party: Stream, kind: str | None) -> None:
        is_aggregators = kind in OF_AGGREGATOR
        if kind not in OF_BOTH and is_aggregators != (party is self._aggregator):
            sender, other = ("aggregator", "server") if party is self._aggregator else ("server", "aggregator")
            raise WireError(f"the {sender} sent a message of kind {kind}, which is the {other}'s")

    def _may_save(self, message: pb.ServerMessage) -> bool:
        windows = range(self._next_update, message.save.window)
        return all(self._strategy.exchange_after(window) == "nothing" for window in windows)

    def _listen(self, stream: Stream, room: threading.Semaphore) -> None:
        try:
            while True:
                room.acquire()
                self._arrived.put((stream, stream.receive()))
        except WireError as error:
            self._arrived.put((stream, error))
