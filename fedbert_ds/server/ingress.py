"""A rank's gRPC endpoint, on an event loop in a thread of its own; it moves messages and decides nothing."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError

from fedbert_ds.errors import UserError, WireError
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire import fedbert_pb2_grpc as rpc
from fedbert_ds.wire.channel import OPTIONS, TlsFiles, server_credentials

UNREAD_MESSAGES = 64
"""Messages of one client that may wait unread; beyond them its stream is not read, so TCP slows it down."""


@dataclass(frozen=True)
class JoinAsked:
    """A client called Join; answer by setting the future's result or a UserError."""

    hello: pb.Hello
    answer: Future[pb.Welcome]


@dataclass(frozen=True)
class JoinAbandoned:
    """A client that waited in Join went away."""

    hello: pb.Hello


@dataclass(frozen=True)
class Connected:
    """A client opened its training stream with a valid session."""

    client: str


@dataclass(frozen=True)
class Received:
    """A message of a connected client."""

    client: str
    message: pb.ClientMessage


@dataclass(frozen=True)
class Disconnected:
    """A client's stream ended, for whatever reason but `Ingress.close`."""

    client: str


Event = JoinAsked | JoinAbandoned | Connected | Received | Disconnected


class _Stream:
    """One client's stream: what is to be written, and how much more may be read."""

    def __init__(self) -> None:
        self.outgoing: asyncio.Queue[pb.ServerMessage | None] = asyncio.Queue()
        self.unread = asyncio.Semaphore(UNREAD_MESSAGES)


class Ingress:
    """Listens from `start` to `stop`; events come out of `next_event`, messages go in through `send`.

    Used from one thread; only the event loop inside runs elsewhere.
    """

    def __init__(self, host: str, port: int, tls: TlsFiles | None) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._sessions: dict[str, str] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ingress", daemon=True)
        self._server: grpc.aio.Server | None = None
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
            event = self._events.get(timeout=timeout) if timeout > 0 else self._events.get_nowait()
        except queue.Empty:
            return None
        if isinstance(event, Received):
            stream = self._streams.get(event.client)
            if stream is not None:
                self._loop.call_soon_threadsafe(stream.unread.release)
        return event

    def send(self, client: str, message: pb.ServerMessage) -> None:
        """Queue a message for a client; messages to one that has gone are dropped."""
        stream = self._streams.get(client)
        if stream is not None:
            # Counted here, not when it leaves: a window's bytes are then all told when the window ends.
            self.bytes_down += message.ByteSize()
            self._loop.call_soon_threadsafe(stream.outgoing.put_nowait, message)

    def close(self, client: str, last: pb.ServerMessage) -> None:
        """Send one last message, then end the client's stream."""
        self.send(client, last)
        stream = self._streams.pop(client, None)
        if stream is not None:
            self._loop.call_soon_threadsafe(stream.outgoing.put_nowait, None)

    def take_bytes(self) -> tuple[int, int]:
        """Bytes received and given out to send since the last call."""
        up, down = self.bytes_up, self.bytes_down
        taken = up - self._taken[0], down - self._taken[1]
        self._taken = up, down
        return taken

    def stop(self, grace: float = 5.0) -> None:
        """Let streams flush for up to `grace` seconds and stop listening; once is enough."""
        if not self._thread.is_alive():
            return
        if self._server is not None:
            asyncio.run_coroutine_threadsafe(self._server.stop(grace), self._loop).result(timeout=grace + 30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    async def _listen(self) -> int:
        self._server = grpc.aio.server(options=OPTIONS)
        rpc.add_FederationServicer_to_server(_Servicer(self), self._server)
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
        self._events.put(JoinAsked(hello, answer))
        try:
            return await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            self._events.put(JoinAbandoned(hello))
            raise

    def open_stream(self, attach: pb.Attach) -> _Stream:
        """A stream for a client with a valid session; WireError otherwise."""
        if not attach.session or self._sessions.get(attach.client) != attach.session:
            raise WireError(f"client {attach.client}: no such session at this endpoint; join the coordinator first")
        if attach.client in self._streams:
            raise WireError(f"client {attach.client} is already connected; give each client its own --id")
        stream = self._streams[attach.client] = _Stream()
        self._events.put(Connected(attach.client))
        return stream

    async def read(self, client: str, stream: _Stream, messages: AsyncIterator[pb.ClientMessage]) -> None:
        """Turn a client's messages into events until its stream ends."""
        try:
            # Bytes that are no message end the stream as a lost connection does.
            with suppress(DecodeError):
                async for message in messages:
                    await stream.unread.acquire()
                    self.bytes_up += message.ByteSize()
                    self._events.put(Received(client, message))
        finally:
            # Otherwise `close` was first, and the client may be back on another stream.
            if self._streams.get(client) is stream:
                del self._streams[client]
                self._events.put(Disconnected(client))
            stream.outgoing.put_nowait(None)


class _Servicer(rpc.FederationServicer):
    """Delegates to the ingress and maps a UserError to a gRPC status, in this one place."""

    def __init__(self, ingress: Ingress) -> None:
        self._ingress = ingress

    async def Join(self, request: pb.Hello, context: grpc.aio.ServicerContext) -> pb.Welcome:
        try:
            return await self._ingress.join(request)
        except UserError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    async def Train(
        self, request_iterator: AsyncIterator[pb.ClientMessage], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ServerMessage]:
        messages = aiter(request_iterator)
        first = pb.ClientMessage()
        with suppress(DecodeError):
            first = await anext(messages, first)
        try:
            stream = self._ingress.open_stream(first.attach)
        except UserError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        client = first.attach.client
        reader = asyncio.create_task(self._ingress.read(client, stream, messages))
        try:
            while (message := await stream.outgoing.get()) is not None:
                yield message
        finally:
            reader.cancel()
