"""A client's stream to its rank over connections that break: real conversations, toy wires.

A broken connection loses what is under way, and both conversations go on over the next one. Now
and then a frame comes twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Protocol

from simulation.world import World

from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.conversation import Conversation


class Listener(Protocol):
    """What a rank's endpoint hears of a stream."""

    def received(self, stream: Stream, message: pb.ClientMessage) -> None: ...

    def connection_changed(self, stream: Stream, is_there: bool) -> None: ...

    def ended(self, stream: Stream) -> None: ...


class _Way:
    """One direction: frames arrive in order, each after a time of its own."""

    def __init__(self) -> None:
        self.conversation = Conversation()
        self.last_arrival = 0.0


class Stream:
    """Messages both ways between a client's process and its rank.

    `on_message` and `on_lost` are the client's; `listener` is the rank's endpoint. Latencies have a
    seed of their own, so that they depend on nothing else in the schedule.
    """

    def __init__(
        self,
        world: World,
        client: str,
        session: str,
        seed: int,
        seconds: float,
        reconnect_timeout: float,
        listener: Listener,
        on_message: Callable[[pb.ServerMessage], None],
        on_lost: Callable[[], None],
    ) -> None:
        self.client, self.session = client, session
        self.is_over = False
        """At the server: it ended, or the server has closed it and the client is told."""
        self.is_closing = False
        self._is_left = False
        """The client's process is gone, or has given up."""
        self._world, self._random, self._seconds = world, random.Random(seed), seconds
        self._reconnect_timeout = reconnect_timeout
        self._listener, self._on_message, self._on_lost = listener, on_message, on_lost
        self._up, self._down = _Way(), _Way()
        self._connection = 1
        """The number of this connection; 0 while there is none."""
        self._num_connections = 1
        self._is_noticed = False
        """The server knows that the connection is lost."""
        self._loss = 0
        """Which loss of a connection a timer belongs to."""

    # -- the rank's side ---------------------------------------------------------------------------

    def send(self, message: pb.ServerMessage) -> None:
        """From the rank to the client."""
        self._down.conversation.put(message.SerializeToString())
        self._push(self._down, self._arrives_at_client)

    def close(self, message: pb.ServerMessage) -> None:
        """A last message; the stream ends for the server."""
        self.send(message)
        self.is_closing = True

    def end(self) -> None:
        """The stream ends for the server at once; the client hears that the connection is lost, and
        cannot come back to it.
        """
        self.is_over = True
        self._listener.ended(self)
        self._world.after(self._latency(), self._give_up)

    # -- the client's side -------------------------------------------------------------------------

    def answer(self, message: pb.ClientMessage) -> None:
        """From the client to its rank."""
        self._up.conversation.put(message.SerializeToString())
        self._push(self._up, self._arrives_at_rank)

    def leave(self, seconds: float) -> None:
        """The client's process is gone; the server notices it so many seconds later."""
        self._is_left = True
        self._connection = 0
        self._world.after(seconds, self._notice)

    # -- the wire ----------------------------------------------------------------------------------

    def cut(self, outage: float, notice: float) -> None:
        """The connection breaks. The client is back after the outage, or gives up; the server
        notices after so many seconds, if the client is not back by then.
        """
        if not self._connection or self._is_left:
            return
        self._connection = 0
        self._loss += 1
        loss = self._loss
        self._world.after(notice, lambda: self._notice() if loss == self._loss and not self._connection else None)
        if outage > self._reconnect_timeout:
            self._world.after(self._reconnect_timeout, self._give_up)
        else:
            self._world.after(outage, self._reconnect)

    def die(self) -> None:
        """The rank is gone, and every message with it."""
        self.is_over, self._connection = True, 0

    def _give_up(self) -> None:
        if not self._is_left:
            self._is_left = True
            self._on_lost()

    def _notice(self) -> None:
        if self.is_over or self._is_noticed or self.is_closing:
            return
        self._is_noticed = True
        self._listener.connection_changed(self, False)
        loss = self._loss

        def timed_out() -> None:
            if self._is_noticed and loss == self._loss and not self.is_over:
                self.is_over = True
                self._listener.ended(self)

        self._world.after(self._reconnect_timeout, timed_out)

    def _reconnect(self) -> None:
        if self._is_left or self._connection:
            return
        if self.is_over:
            self._give_up()
            return
        self._num_connections += 1
        self._connection = self._num_connections
        up, down = self._up.conversation, self._down.conversation
        down.resume(up.received)
        up.resume(down.received)
        if self._is_noticed:
            self._is_noticed = False
            self._listener.connection_changed(self, True)
        self._push(self._down, self._arrives_at_client)
        self._push(self._up, self._arrives_at_rank)

    def _push(self, way: _Way, arrive: Callable[[bytes], None]) -> None:
        connection = self._connection
        if not connection:
            return
        while (frame := way.conversation.frame()) is not None:
            for _ in range(2 if self._random.random() < 0.02 else 1):
                at = max(way.last_arrival, self._world.now + self._latency())
                way.last_arrival = at
                self._world.at(at, lambda frame=frame: self._arrive(connection, arrive, frame))

    def _arrive(self, connection: int, arrive: Callable[[bytes], None], frame: bytes) -> None:
        if connection == self._connection and not self._is_left:
            arrive(frame)

    def _latency(self) -> float:
        return self._seconds * self._random.random() if self._random.random() < 0.9 else 4 * self._seconds

    def _arrives_at_client(self, frame: bytes) -> None:
        message = pb.ServerMessage.FromString(frame)
        if self._up.conversation.take(message.delivery, len(frame)):
            self._on_message(message)

    def _arrives_at_rank(self, frame: bytes) -> None:
        message = pb.ClientMessage.FromString(frame)
        is_new = self._down.conversation.take(message.delivery, len(frame))
        if is_new and not self.is_closing and not self.is_over:
            message.ClearField("delivery")
            self._listener.received(self, message)
