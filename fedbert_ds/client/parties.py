"""A client's two conversations where another party is the aggregator: which message is whose.

Client updates go to the aggregator and nothing else does; the client model comes from it alone.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from typing import Protocol

from fedbert_ds.errors import ConnectionLost, WireError
from fedbert_ds.federation.strategy import Strategy
from fedbert_ds.wire import fedbert_pb2 as pb

OF_AGGREGATOR = frozenset({"update", "reference", "update_request"})
"""Kinds of messages about the client model, which only the aggregator sends."""
LAST_WORDS = frozenset({"finish", "refused"})
"""The server's ends the run. The aggregator's says that it is gone, or lost this client."""

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

    In one stream the order of messages sees to it that a client begins with the reference that a
    Begin announces, and saves the half with the steps of all windows before. Here a Begin of the
    server waits for the aggregator's of the same attempt, and takes its window from it if a
    reference follows; what the aggregator sent before that is of windows that were undone. All else
    of the server waits until the reference is whole, and a request to save for the combined updates
    before it.
    """

    def __init__(self, server: Stream, aggregator: Stream, strategy: Strategy) -> None:
        self._server, self._aggregator = server, aggregator
        self._strategy = strategy
        self._of_server: deque[pb.ServerMessage] = deque()
        self._of_aggregator: deque[pb.ServerMessage] = deque()
        """Messages that wait, in their order."""
        self._begin: pb.Begin | None = None
        """The server's, which waits for the aggregator's."""
        self._attempt = -1
        """Of the last Begin that was handed on."""
        self._reference_arrives = False
        self._next_update = 0
        """Combined updates of all windows before this one are in the half or were handed on."""
        self._aggregator_lost: WireError | None = None
        self._arrived: queue.SimpleQueue[tuple[Stream, pb.ServerMessage | WireError]] = queue.SimpleQueue()
        self._server_room = threading.Semaphore(UNHANDLED)
        self._aggregator_room = threading.Semaphore(UNHANDLED)
        for stream, room in ((server, self._server_room), (aggregator, self._aggregator_room)):
            threading.Thread(target=self._listen, args=(stream, room), daemon=True).start()

    def send(self, message: pb.ClientMessage) -> None:
        """Send a message to the party that it is for."""
        kind = message.WhichOneof("body")
        if kind != "update":
            self._server.send(message)
        if kind in ("update", "begun"):
            self._aggregator.send(message)

    def receive(self) -> pb.ServerMessage:
        """Wait for the next message of either party.

        Raises WireError once the server's stream has ended, or the aggregator's and the server says
        nothing more; and for a message that is not the sender's to send.
        """
        while True:
            message = self._next_of_aggregator() or self._next_of_server()
            if message is not None:
                return message
            try:
                party, arrived = self._arrived.get(timeout=LAST_WORD_SECONDS if self._aggregator_lost else None)
            except queue.Empty:
                assert self._aggregator_lost is not None
                raise self._aggregator_lost from None
            if isinstance(arrived, WireError):
                if party is self._server:
                    raise arrived
                self._aggregator_lost = arrived
                continue
            if party is self._server:
                # What waits of it is little: it asks nothing of a client that has not begun.
                self._server_room.release()
            kind = arrived.WhichOneof("body")
            self._check(party, kind)
            if kind not in LAST_WORDS:
                (self._of_server if party is self._server else self._of_aggregator).append(arrived)
            elif party is self._server:
                return arrived
            else:
                last = arrived.finish if kind == "finish" else arrived.refused
                self._aggregator_lost = ConnectionLost(f"the aggregator ended its stream: {last.reason}")

    def _next_of_aggregator(self) -> pb.ServerMessage | None:
        """The aggregator's next message, if it may be handed on; before all others a Begin."""
        while self._of_aggregator:
            message = self._of_aggregator[0]
            kind = message.WhichOneof("body")
            if kind == "begin" and message.begin.attempt > self._awaited_attempt:
                return None  # the server's Begin of this attempt is on its way
            self._of_aggregator.popleft()
            self._aggregator_room.release()
            if kind == "begin" and self._begin is not None and message.begin.attempt == self._begin.attempt:
                return pb.ServerMessage(begin=self._begun(message.begin.window))
            if self._begin is not None or kind == "begin":
                continue  # of windows that were undone
            if kind == "reference":
                if not self._reference_arrives:
                    raise WireError("the aggregator sent a reference client model to a client that has one")
                self._reference_arrives = not message.reference.last
            elif kind == "update" and message.update.last:
                self._next_update = message.update.window + 1
            return message
        return None

    @property
    def _awaited_attempt(self) -> int:
        return self._attempt if self._begin is None else self._begin.attempt

    def _begun(self, window: int) -> pb.Begin:
        """The server's Begin, now that the aggregator's has come."""
        assert self._begin is not None
        begin, self._begin = self._begin, None
        self._attempt = begin.attempt
        self._reference_arrives = begin.reference
        if begin.reference:
            begin.window = window
        self._next_update = begin.window
        return begin

    def _next_of_server(self) -> pb.ServerMessage | None:
        """The server's next message that may be handed on."""
        if self._reference_arrives:
            return None
        for place, message in enumerate(self._of_server):
            kind = message.WhichOneof("body")
            if kind == "begin":
                # A newer one takes the place of one that waits, and what lies between is over.
                for _ in range(place + 1):
                    self._of_server.popleft()
                self._begin = message.begin
                return self._next_of_aggregator()
            if self._begin is not None or (kind == "save" and not self._may_save(message)):
                continue
            del self._of_server[place]
            return message
        return None

    def _check(self, party: Stream, kind: str | None) -> None:
        is_aggregators = kind in OF_AGGREGATOR
        if kind not in LAST_WORDS | {"begin"} and is_aggregators != (party is self._aggregator):
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
