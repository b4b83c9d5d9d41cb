"""Listens for a rank's clients with gRPC; moves serialized messages and decides nothing."""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Generic, TypeVar

import grpc

from fedbert_ds.errors import UserError, WireError
from fedbert_ds.server.network import limits
from fedbert_ds.server.network.call_rate import CallRate, address_of
from fedbert_ds.server.network.client_stream import ClientStream, UnreadBytes
from fedbert_ds.server.network.door import Door, DoorRules
from fedbert_ds.server.network.events import (
    Attached,
    Connected,
    Detached,
    Disconnected,
    Event,
    JoinAbandoned,
    JoinAsked,
)
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.channel import JOIN, TRAIN, TlsFiles, server_credentials
from fedbert_ds.wire.host_port import host_port
from fedbert_ds.wire.introduction import introduction

M = TypeVar("M")
"""The event of a client's message."""


class Listener(Generic[M]):
    """Listens from `start` to `stop`: `next_event` returns events, `send_body` sends messages.

    Used from one thread; an event loop in another thread does the work. A client that loses its
    connection has `reconnect_timeout` seconds to come back; messages both ways wait for it, none is
    lost or doubled. `make_event(stream, message, frame, num_bytes)` makes the event of a client's
    message, on the event loop: from the parsed message, the bytes it came as, and its size without
    the delivery.
    """

    def __init__(
        self,
        host: str,
        port: int,
        tls: TlsFiles | None,
        reconnect_timeout: float,
        shares_memory: bool,
        make_event: Callable[[ClientStream, pb.ClientMessage, bytes, int], M],
        rules: DoorRules,
    ) -> None:
        self._address = host_port(host, port)
        self._tls = tls
        self._reconnect_timeout = reconnect_timeout
        self._shares_memory = shares_memory
        self._make_event = make_event
        self._rules = rules
        self.door = Door(DoorRules(), has_tls=False)
        """Who may come; from `start` on by the rules."""
        self._events: queue.SimpleQueue[tuple[Event | M, Callable[[], None] | None]] = queue.SimpleQueue()
        """Events, each with a function for the event loop to call when the event is taken."""
        self._streams: dict[str, ClientStream] = {}
        self._closing: dict[str, ClientStream] = {}
        self._sessions: dict[str, str] = {}
        self._spent: dict[str, str] = {}
        """The session of each client that has opened its stream last: each opens one."""
        self._most_kept: float = math.inf
        self._all_unread = UnreadBytes()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._server: grpc.aio.Server | None = None

    def start(self) -> int:
        """Listen; returns the port. WireError if it is in use, or the host not this machine's, or a
        file of TLS does not fit.
        """
        self.door = Door(self._rules, self._tls is not None)
        self._thread.start()
        return asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(timeout=30)

    def admit(self, sessions: dict[str, str]) -> None:
        """Let these clients open a stream, too, each with its session; streams that they have with
        earlier ones end.
        """
        self._sessions.update(sessions)
        for client, session in sessions.items():
            stream = self._streams.get(client)
            if stream is not None and stream.session != session:
                self._loop.call_soon_threadsafe(stream.finish)

    def revoke(self, client: str) -> None:
        """Let a client open no further stream."""
        self._sessions.pop(client, None)
        self._spent.pop(client, None)

    def keep_at_most(self, num_bytes: int) -> None:
        """Keep at most so many bytes for a client that comes from now on."""
        self._most_kept = num_bytes

    def next_event(self, timeout: float) -> Event | M | None:
        """The oldest event, waiting up to `timeout` seconds for one."""
        try:
            event, when_taken = self._events.get(timeout=timeout) if timeout > 0 else self._events.get_nowait()
        except queue.Empty:
            return None
        if when_taken is not None:
            self._loop.call_soon_threadsafe(when_taken)
        return event

    @property
    def num_waiting(self) -> int:
        """Events that wait for `next_event`."""
        return self._events.qsize()

    def is_connected(self, client: str) -> bool:
        """The client has an open stream, even if it is between two connections."""
        return client in self._streams

    def send_body(self, client: str, body: bytes) -> None:
        """Queue a serialized ServerMessage; dropped if the client is gone."""
        stream = self._streams.get(client)
        if stream is not None:
            self._loop.call_soon_threadsafe(stream.put, body)

    def close_body(self, client: str, body: bytes) -> None:
        """Send one last message, then end the client's stream."""
        stream = self._streams.get(client)
        if stream is not None:
            self._loop.call_soon_threadsafe(stream.put, body)
            # In this order: a client that comes back just now finds its stream.
            self._closing[client] = stream
            self._streams.pop(client, None)
            self._loop.call_soon_threadsafe(self._close, stream)

    def stop(self, grace: float = 5.0) -> None:
        """Let streams flush for up to `grace` seconds, stop listening. Further calls do nothing."""
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._end(grace), self._loop).result(timeout=grace + 30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    # -- on the event loop -------------------------------------------------------------------------

    def servicer(self) -> Servicer:
        """The calls that are answered here."""
        return Servicer(self)

    async def join(self, hello: pb.Hello) -> pb.Welcome:
        """Make a Join an event and wait for its answer; raises the answer if it is a UserError."""
        answer: Future[pb.Welcome] = Future()
        self._events.put((JoinAsked(hello, answer), None))
        try:
            return await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            self._events.put((JoinAbandoned(hello), None))
            raise

    def attach(self, attach: pb.Attach) -> tuple[ClientStream, object]:
        """A client's stream, opened if there is none, and its new connection; WireError if its
        session is wrong, or its count of messages.
        """
        stream = self._streams.get(attach.client) or self._closing.get(attach.client)
        if stream is not None and stream.session == attach.session:
            return stream, stream.attach(attach)
        if not attach.session or self._sessions.get(attach.client) != attach.session:
            raise WireError(f"client {attach.client}: no such session at this endpoint; join the coordinator first")
        if attach.received or self._spent.get(attach.client) == attach.session:
            raise WireError(f"client {attach.client}: its session is over; it was away for too long")
        stream = self._streams[attach.client] = ClientStream(
            attach.client,
            attach.session,
            self._reconnect_timeout,
            self._shares_memory,
            self._hand_on,
            self._ended,
            self._connection_changed,
            self._most_kept,
            self._all_unread,
        )
        self._spent[attach.client] = attach.session
        connection = stream.attach(attach)
        # Told once the stream knows the process: one that is killed at once is not waited for.
        self._events.put((Connected(attach.client, attach.session), None))
        return stream, connection

    def _hand_on(self, stream: ClientStream, message: pb.ClientMessage, frame: bytes, num_bytes: int) -> None:
        event = self._make_event(stream, message, frame, num_bytes)
        self._events.put((event, partial(stream.handled, num_bytes)))

    def _connection_changed(self, stream: ClientStream, is_there: bool) -> None:
        if self._streams.get(stream.client) is stream:
            kind = Attached if is_there else Detached
            self._events.put((kind(stream.client, stream.session), None))

    def _close(self, stream: ClientStream) -> None:
        stream.close()
        if stream.is_over:  # it ended while `close_body` ran
            self._ended(stream)

    def _ended(self, stream: ClientStream) -> None:
        """Forget a stream; it is an event unless the server closed it."""
        if self._closing.get(stream.client) is stream:
            del self._closing[stream.client]
        # Otherwise `close_body` was first, and the client may be back on another stream.
        if self._streams.get(stream.client) is stream:
            del self._streams[stream.client]
            self._events.put((Disconnected(stream.client, stream.reason, stream.session), None))

    async def _listen(self) -> int:
        self._server = grpc.aio.server(options=limits.server_options(limits.raise_descriptor_limit()))
        self._server.add_generic_rpc_handlers((self.servicer(),))
        try:
            if self._tls is None:
                port: int = self._server.add_insecure_port(self._address)
            else:
                port = self._server.add_secure_port(self._address, server_credentials(self._tls))
        except RuntimeError as error:
            raise WireError(
                f"{self._address}: the port is in use or the address is not this machine's; "
                "change server.port or server.host"
            ) from error
        await self._server.start()
        self._watch = self._loop.create_task(self.door.watch(self._streams))
        return port

    async def _end(self, grace: float) -> None:
        """Wait until clients have the last messages of closed streams, then stop the server."""
        self.door.refusals.close()
        deadline = self._loop.time() + grace
        while self._closing and self._loop.time() < deadline:
            await asyncio.sleep(0.02)
        if self._server is not None:
            await self._server.stop(max(0.0, deadline - self._loop.time()))


class Servicer(grpc.GenericRpcHandler):
    """Passes calls on to the listener; the one place where a UserError becomes a gRPC status."""

    def __init__(self, listener: Listener[Any]) -> None:
        self._listener = listener
        self._calls = CallRate(limits.CALLS_AT_ONCE, limits.CALLS_PER_SECOND)
        """Joins, and streams that were refused."""
        self.handlers = {
            JOIN: unread(self.join, pb.Welcome.SerializeToString),
            TRAIN: grpc.stream_stream_rpc_method_handler(self.train),
        }

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """The handler of a call, or None."""
        return self.handlers.get(details.method)

    def let_in(self, context: grpc.aio.ServicerContext, attach: pb.Attach) -> None:
        """WireError for a caller who may not open the stream of this client."""
        self._listener.door.let_in(context.auth_context(), attach.client, attach.token)

    async def join(self, frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> pb.Welcome:
        """Join."""
        await self.turn_away_beyond_rate(context)
        try:
            hello = introduction(context.invocation_metadata(), pb.Hello)
            self._listener.door.let_in(context.auth_context(), hello.client, hello.token)
            return await self._listener.join(hello)
        except UserError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    async def train(self, frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """Train, and every other conversation of the same form."""
        try:
            attach = introduction(context.invocation_metadata(), pb.Attach)
            self.let_in(context, attach)
            stream, connection = self._listener.attach(attach)
        except UserError as error:
            await self.turn_away_beyond_rate(context)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        reader = asyncio.create_task(stream.read(connection, frames))
        try:
            async for frame in stream.write(connection):
                yield frame
        finally:
            reader.cancel()

    async def turn_away_beyond_rate(self, context: grpc.aio.ServicerContext) -> None:
        """Turn a stranger away, after a second, whose address calls more often than any client."""
        if not self._calls.admits(address_of(context.peer()), time.monotonic()):
            await asyncio.sleep(limits.TURN_AWAY_SECONDS)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "too many calls from this address; call again later")


def unread(answer: Callable[..., Awaitable[M]], serialize: Callable[[M], bytes]) -> grpc.RpcMethodHandler:
    """The handler of a call whose caller has said everything in the metadata: its request, which
    should be empty, is not taken into memory.
    """
    return grpc.stream_unary_rpc_method_handler(answer, None, serialize)
