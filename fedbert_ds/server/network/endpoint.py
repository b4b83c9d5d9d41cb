"""A rank's gRPC endpoint, on an event loop in a thread of its own; it moves messages and decides nothing."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import suppress

import grpc
from google.protobuf.message import DecodeError

from fedbert_ds.errors import UserError, WireError
from fedbert_ds.server.network.events import Connected, Disconnected, Event, JoinAbandoned, JoinAsked, Received
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.channel import JOIN, OPTIONS, TRAIN, TlsFiles, server_credentials
from fedbert_ds.wire.conversation import (
    ACKNOWLEDGE_SECONDS,
    MESSAGE_BYTES,
    RECONNECT_SECONDS,
    UNREAD_BYTES,
    Conversation,
)
from fedbert_ds.wire.shared_memory import SharedMemory, accept

BACKLOG_BYTES = 8 << 30
"""Bytes that may wait for one client to take them, a whole half among them; beyond them it counts as lost."""


class _Stream:
    """One client's stream, over however many connections; belongs to the event loop."""

    def __init__(self, client: str, session: str) -> None:
        self.client = client
        self.session = session
        self.conversation = Conversation()
        self.connection: object | None = None
        """Stands for the connection of now; None while there is none."""
        self.memory: SharedMemory | None = None
        """What the client of this connection shares."""
        self.changed = asyncio.Event()
        """Something to send, or another connection, or the end."""
        self.unread_bytes = 0
        self.room = asyncio.Event()
        """Set when `unread_bytes` has become less."""
        self.is_closing = False
        """The server has said its last word; the stream ends when the client has it."""
        self.is_over = False
        self.timer: asyncio.TimerHandle | None = None
        """Runs while there is no connection, and after the last word."""

    def share(self, memory: SharedMemory | None) -> None:
        """From now on large messages go through this memory, of the connection of now."""
        if self.memory is not None:
            self.memory.close()
        self.memory = memory
        self.conversation.ring = memory.outgoing if memory is not None else None

    def read_shared(self, delivery: pb.Delivery) -> bytes:
        """The message that lies in the client's memory; WireError when there is none."""
        if self.memory is None:
            raise WireError(f"client {self.client}: a message in memory that is not shared")
        return self.memory.incoming.read(delivery.shared_start, delivery.shared_bytes)

    def wake(self) -> None:
        self.changed.set()
        self.room.set()


class Endpoint:
    """Listens from `start` to `stop`; events come out of `next_event`, messages go in through `send`.

    Used from one thread; only the event loop inside runs elsewhere. A client that loses its connection has
    `reconnect_timeout` seconds to come back; messages both ways wait for it, none is lost or doubled.
    """

    def __init__(
        self,
        host: str,
        port: int,
        tls: TlsFiles | None,
        reconnect_timeout: float = RECONNECT_SECONDS,
        shares_memory: bool = True,
    ) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._reconnect_timeout = reconnect_timeout
        self._shares_memory = shares_memory
        self._events: queue.SimpleQueue[tuple[Event, _Stream | None, int]] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._closing: dict[str, _Stream] = {}
        self._sessions: dict[str, str] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._server: grpc.aio.Server | None = None
        self._last_sent: tuple[pb.ServerMessage, bytes] | None = None
        self.bytes_up = 0
        self.bytes_down = 0
        self._taken = (0, 0)

    def start(self) -> int:
        """Listen; returns the port. Raises WireError when the port is taken."""
        self._thread.start()
        return asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(timeout=30)

    def admit(self, sessions: dict[str, str]) -> None:
        """From now on these clients may open a stream, each with its session."""
        self._sessions = dict(sessions)

    def revoke(self, client: str) -> None:
        """A client that was dropped may not open another stream: it has missed steps of its half."""
        self._sessions.pop(client, None)

    def next_event(self, timeout: float) -> Event | None:
        """The oldest event, waiting up to `timeout` seconds for one."""
        try:
            event, stream, num_bytes = self._events.get(timeout=timeout) if timeout > 0 else self._events.get_nowait()
        except queue.Empty:
            return None
        if stream is not None:
            self._loop.call_soon_threadsafe(self._has_read, stream, num_bytes)
        return event

    def send(self, client: str, message: pb.ServerMessage) -> None:
        """Queue a message for a client; messages to one that has gone are dropped."""
        stream = self._streams.get(client)
        if stream is not None:
            # Serialized once for all its receivers: a half goes to many.
            if self._last_sent is None or self._last_sent[0] is not message:
                self._last_sent = message, message.SerializeToString()
            self.send_body(client, self._last_sent[1])

    def send_body(self, client: str, body: bytes) -> None:
        """As `send`, for a message that is serialized already."""
        stream = self._streams.get(client)
        if stream is not None:
            # Counted here, not when it leaves: a window's bytes are then all told when the window ends.
            self.bytes_down += len(body)
            self._loop.call_soon_threadsafe(self._put, stream, body)

    def close(self, client: str, last: pb.ServerMessage) -> None:
        """Send one last message, then end the client's stream."""
        self.close_body(client, last.SerializeToString())

    def close_body(self, client: str, body: bytes) -> None:
        """As `close`, for a message that is serialized already."""
        self.send_body(client, body)
        stream = self._streams.get(client)
        if stream is not None:
            # In this order: a client that comes back just now finds its stream.
            self._closing[client] = stream
            self._streams.pop(client, None)
            self._loop.call_soon_threadsafe(self._close, stream)

    def take_bytes(self) -> tuple[int, int]:
        """Bytes received and given out to send since the last call; what was sent again counts once."""
        up, down = self.bytes_up, self.bytes_down
        taken = up - self._taken[0], down - self._taken[1]
        self._taken = up, down
        return taken

    def stop(self, grace: float = 5.0) -> None:
        """Let streams flush for up to `grace` seconds and stop listening; once is enough."""
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._end(grace), self._loop).result(timeout=grace + 30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    async def _listen(self) -> int:
        self._server = grpc.aio.server(options=OPTIONS)
        servicer = _Servicer(self)
        self._server.add_generic_rpc_handlers((servicer,))
        address = f"{self._host}:{self._port}"
        try:
            if self._tls is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, server_credentials(self._tls))
        except RuntimeError as error:
            raise WireError(
                f"{address}: the port is in use or the address is not this machine's; change server.port or server.host"
            ) from error
        await self._server.start()
        return port

    # -- called on the event loop ---------------------------------------------------------------------------------

    async def join(self, hello: pb.Hello) -> pb.Welcome:
        """Hand a Join to the main thread and wait for its answer."""
        answer: Future[pb.Welcome] = Future()
        self._tell(JoinAsked(hello, answer))
        try:
            return await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            self._tell(JoinAbandoned(hello))
            raise

    def attach(self, attach: pb.Attach, connection: object) -> _Stream:
        """The stream of a client with a valid session, now on this connection; WireError if it has none.

        A connection that it had before is over: the client knows that sooner than the server.
        """
        stream = self._streams.get(attach.client) or self._closing.get(attach.client)
        if stream is None or stream.session != attach.session:
            if not attach.session or self._sessions.get(attach.client) != attach.session:
                raise WireError(f"client {attach.client}: no such session at this endpoint; join the coordinator first")
            if attach.received:
                raise WireError(f"client {attach.client}: its session is over; it was away for too long")
            stream = self._streams[attach.client] = _Stream(attach.client, attach.session)
            self._tell(Connected(attach.client))
        stream.conversation.resume(attach.received)
        stream.share(accept(attach.shared) if attach.HasField("shared") and self._shares_memory else None)
        stream.connection = connection
        if stream.timer is not None and not stream.is_closing:
            stream.timer.cancel()
        stream.wake()
        return stream

    async def read(self, stream: _Stream, connection: object, frames: AsyncIterator[bytes]) -> None:
        """Turn a client's messages into events until this connection ends."""
        try:
            async for frame in frames:
                message = pb.ClientMessage.FromString(frame)
                if stream.connection is not connection:
                    return
                delivery = message.delivery
                num_bytes = delivery.shared_bytes or len(frame) - delivery.ByteSize() - DELIVERY_HEADER_BYTES
                is_new = stream.conversation.take(delivery, num_bytes)
                if delivery.shared_bytes and is_new:
                    frame = stream.read_shared(delivery)
                    message = pb.ClientMessage.FromString(frame)
                message.ClearField("delivery")
                stream.changed.set()
                if is_new and message.HasField("leave"):
                    return self._finish(stream)
                if is_new and not stream.is_closing:
                    self.bytes_up += num_bytes
                    await self._hand_on(
                        stream, self._received(stream.client, message, frame, num_bytes), max(num_bytes, MESSAGE_BYTES)
                    )
        except (DecodeError, WireError):
            # Nothing that could be answered: it is no client of ours at the other end.
            self._finish(stream)
        finally:
            self._lose(stream, connection)

    async def write(self, stream: _Stream, connection: object) -> AsyncIterator[bytes]:
        """What there is to say on this connection, until it ends or the stream is over."""
        yield stream.conversation.greeting()
        is_late = False
        while stream.connection is connection and not stream.is_over:
            frame = stream.conversation.frame(acknowledge=is_late)
            is_late = False
            if frame is not None:
                yield frame
                continue
            if stream.is_closing and stream.conversation.is_idle:
                self._finish(stream)
                return
            stream.changed.clear()
            try:
                timeout = ACKNOWLEDGE_SECONDS if stream.conversation.is_untold else None
                await asyncio.wait_for(stream.changed.wait(), timeout)
            except asyncio.TimeoutError:
                is_late = True

    def _received(self, client: str, message: pb.ClientMessage, frame: bytes, num_bytes: int) -> Event:
        """The event of a message of `num_bytes`, which came as `frame`."""
        return Received(client, message)

    async def _hand_on(self, stream: _Stream, event: Event, num_bytes: int) -> None:
        """Tell of a message, and wait until there is room for the next."""
        stream.unread_bytes += num_bytes
        self._events.put((event, stream, num_bytes))
        while stream.unread_bytes > UNREAD_BYTES and not stream.is_closing:
            stream.room.clear()
            await stream.room.wait()

    def _has_read(self, stream: _Stream, num_bytes: int) -> None:
        stream.unread_bytes -= num_bytes
        stream.room.set()

    def _put(self, stream: _Stream, body: bytes) -> None:
        if stream.is_over:
            return
        stream.conversation.put(body)
        if stream.conversation.kept_bytes > BACKLOG_BYTES:
            self._finish(stream)
        stream.wake()

    def _close(self, stream: _Stream) -> None:
        """After its last message: the stream ends when the client has it, or in a while without."""
        stream.is_closing = True
        if stream.is_over:
            self._closing.pop(stream.client, None)
        else:
            self._restart_timer(stream)
        stream.wake()

    def _lose(self, stream: _Stream, connection: object) -> None:
        """The connection is gone; the stream is, too, unless the client comes back in time."""
        if stream.connection is connection:
            stream.connection = None
            stream.share(None)
            if not stream.is_over and not stream.is_closing:
                self._restart_timer(stream)
            stream.wake()

    def _restart_timer(self, stream: _Stream) -> None:
        if stream.timer is not None:
            stream.timer.cancel()
        stream.timer = self._loop.call_later(self._reconnect_timeout, self._finish, stream)

    def _finish(self, stream: _Stream) -> None:
        """The stream is over, now; told, unless the server itself has closed it."""
        if stream.is_over:
            return
        stream.is_over = True
        if stream.timer is not None:
            stream.timer.cancel()
        if self._closing.get(stream.client) is stream:
            del self._closing[stream.client]
        # Otherwise `close` was first, and the client may be back on another stream.
        if self._streams.get(stream.client) is stream:
            del self._streams[stream.client]
            self._tell(Disconnected(stream.client))
        stream.wake()

    def _tell(self, event: Event) -> None:
        self._events.put((event, None, 0))

    async def _end(self, grace: float) -> None:
        """Wait for the streams that were closed to be taken to their end, then stop the server."""
        deadline = self._loop.time() + grace
        while self._closing and self._loop.time() < deadline:
            await asyncio.sleep(0.02)
        if self._server is not None:
            await self._server.stop(max(0.0, deadline - self._loop.time()))


DELIVERY_HEADER_BYTES = 2
"""Tag and length of a Delivery, whose own size is below 128."""


class _Servicer(grpc.GenericRpcHandler):
    """Delegates to the endpoint and maps a UserError to a gRPC status, in this one place."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._handlers = {
            JOIN: grpc.unary_unary_rpc_method_handler(self.join, pb.Hello.FromString, pb.Welcome.SerializeToString),
            TRAIN: grpc.stream_stream_rpc_method_handler(self.train),
        }

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(details.method)

    async def join(self, request: pb.Hello, context: grpc.aio.ServicerContext) -> pb.Welcome:
        try:
            return await self._endpoint.join(request)
        except UserError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    async def train(self, frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        frames = aiter(frames)
        first = pb.ClientMessage()
        with suppress(DecodeError):
            first = pb.ClientMessage.FromString(await anext(frames, b""))
        connection = object()
        try:
            stream = self._endpoint.attach(first.attach, connection)
        except UserError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        reader = asyncio.create_task(self._endpoint.read(stream, connection, frames))
        try:
            async for frame in self._endpoint.write(stream, connection):
                yield frame
        finally:
            reader.cancel()
