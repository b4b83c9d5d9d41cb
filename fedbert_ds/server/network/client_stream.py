"""One client's messages both ways, over as many connections as it takes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable

import psutil
from google.protobuf.message import DecodeError

from fedbert_ds.errors import WireError
from fedbert_ds.server.network.neighbour import has_ended, neighbour
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.conversation import ACKNOWLEDGE_SECONDS, MESSAGE_BYTES, UNREAD_BYTES, Conversation
from fedbert_ds.wire.shared_memory import SharedMemory, accept

ALL_UNREAD_BYTES = 512 << 20
"""Received bytes of all clients that wait to be handled, beyond which only those are read that have
none waiting.
"""

LOOK_SECONDS = 0.5
"""Between looks for the process of a client on this machine that has lost its connection."""

DELIVERY_HEADER_BYTES = 2
"""Tag and length of a Delivery, whose own size is below 128."""


class UnreadBytes:
    """Received bytes of all clients that wait to be handled. Used on the event loop alone."""

    def __init__(self) -> None:
        self._bytes = 0
        self._fell = asyncio.Event()

    @property
    def are_too_many(self) -> bool:
        """Nobody should send more who has sent what waits."""
        return self._bytes > ALL_UNREAD_BYTES

    def change(self, num_bytes: int) -> None:
        """So many more wait, or fewer."""
        self._bytes += num_bytes
        if num_bytes < 0:
            self._fell.set()

    async def fall(self) -> None:
        """Wait until there are fewer."""
        self._fell.clear()
        await self._fell.wait()


class ClientStream:
    """A client's conversation with the rank: its connection, shared memory, unread bytes, timer.

    Every method runs on the event loop. `on_message(stream, message, frame, num_bytes)` gets each
    message of the client once and in order: parsed, as it came, and its size without the delivery;
    `handled(num_bytes)` must follow. `on_end(stream)` is called once, and
    `on_connection(stream, is_there)` when a connection is lost or is back. Without a connection the
    stream ends after `reconnect_timeout` seconds, and at once when more than `most_kept` bytes wait
    for the client's acknowledgement.
    """

    def __init__(
        self,
        client: str,
        session: str,
        reconnect_timeout: float,
        shares_memory: bool,
        on_message: Callable[[ClientStream, pb.ClientMessage, bytes, int], None],
        on_end: Callable[[ClientStream], None],
        on_connection: Callable[[ClientStream, bool], None],
        most_kept: float = math.inf,
        all_unread: UnreadBytes | None = None,
    ) -> None:
        self.client = client
        self.session = session
        self.is_over = False
        self.reason = ""
        """Why the server ended it, if it did."""
        self._most_kept = most_kept
        self._all_unread = all_unread or UnreadBytes()
        self._reconnect_timeout = reconnect_timeout
        self._shares_memory = shares_memory
        self._on_message = on_message
        self._on_end = on_end
        self._on_connection = on_connection
        self._is_lost = False
        """There was a connection, and there is none."""
        self._conversation = Conversation()
        self._connection: object | None = None
        """Stands for the current connection; None while there is none."""
        self._process: psutil.Process | None = None
        """The client's, if it is on this machine."""
        self._memory: SharedMemory | None = None
        """Shared by the client for the current connection."""
        self._changed = asyncio.Event()
        """Set when there is something to send, another connection, or the end."""
        self._unread_bytes = 0
        self._room = asyncio.Event()
        """Set when `_unread_bytes` has fallen."""
        self._is_closing = False
        """The server has sent its last message; the stream ends when the client has it."""
        self._timer: asyncio.TimerHandle | None = None
        """Ends the stream; runs while there is no connection, and after the last message."""

    def attach(self, attach: pb.Attach) -> object:
        """Continue over a new connection, in place of an earlier one; returns the connection.

        The client may know before the server that a connection is lost. Raises WireError when the
        client has received messages that this conversation did not send.
        """
        self._conversation.resume(attach.received)
        self._process = neighbour(attach.shared) if attach.HasField("shared") else None
        self._share(accept(attach.shared) if attach.HasField("shared") and self._shares_memory else None)
        self._connection = connection = object()
        if self._is_lost:
            self._is_lost = False
            self._on_connection(self, True)
        if not self._is_closing:
            self._stop_timer()
        self._wake()
        return connection

    async def read(self, connection: object, frames: AsyncIterator[bytes]) -> None:
        """Hand on the client's messages until this connection ends."""
        try:
            async for frame in frames:
                message = pb.ClientMessage.FromString(frame)
                if self._connection is not connection:
                    return
                self._take(message, frame)
                if self.is_over:
                    return
                while self._unread_bytes > UNREAD_BYTES and not self._is_closing:
                    self._room.clear()
                    await self._room.wait()
                while self._unread_bytes and self._all_unread.are_too_many and not self._is_closing:
                    await self._all_unread.fall()
        except (DecodeError, WireError):
            # Nothing that could be answered: the other end is no client of ours.
            self.finish()
        finally:
            self._lose(connection)

    async def write(self, connection: object) -> AsyncIterator[bytes]:
        """The frames to send on this connection, until it ends or the stream is over."""
        yield self._conversation.greeting()
        is_late = False
        while self._connection is connection and not self.is_over:
            frame = self._conversation.frame(acknowledge=is_late)
            is_late = False
            if frame is not None:
                yield frame
                continue
            if self._is_closing and self._conversation.is_idle:
                self.finish()
                return
            self._changed.clear()
            try:
                timeout = ACKNOWLEDGE_SECONDS if self._conversation.is_untold else None
                await asyncio.wait_for(self._changed.wait(), timeout)
            except asyncio.TimeoutError:
                is_late = True

    def put(self, body: bytes) -> None:
        """Queue a serialized message for the client."""
        if self.is_over:
            return
        self._conversation.put(body)
        if self._conversation.kept_bytes > self._most_kept:
            kept, most = (round(number / 1e6) for number in (self._conversation.kept_bytes, self._most_kept))
            self.reason = f"it has left {kept} MB unread, and the server keeps {most} MB for a client"
            self.finish()
        self._wake()

    def handled(self, num_bytes: int) -> None:
        """A message of `num_bytes` has been handled: there is room for more."""
        self._unread_bytes -= max(num_bytes, MESSAGE_BYTES)
        self._all_unread.change(-max(num_bytes, MESSAGE_BYTES))
        self._room.set()

    def close(self) -> None:
        """End when the client has the last message, or after `reconnect_timeout` seconds."""
        self._is_closing = True
        if not self.is_over:
            self._restart_timer()
        self._wake()

    def finish(self) -> None:
        """End now."""
        if self.is_over:
            return
        self.is_over = True
        self._stop_timer()
        self._on_end(self)
        self._wake()

    def _take(self, message: pb.ClientMessage, frame: bytes) -> None:
        delivery = message.delivery
        num_bytes = delivery.shared_bytes or len(frame) - delivery.ByteSize() - DELIVERY_HEADER_BYTES
        is_new = self._conversation.take(delivery, num_bytes)
        self._changed.set()
        if not is_new:
            return
        if delivery.shared_bytes:
            frame = self._read_shared(delivery)
            message = pb.ClientMessage.FromString(frame)
        message.ClearField("delivery")
        if message.HasField("leave"):
            self.finish()
        elif not self._is_closing:
            self._unread_bytes += max(num_bytes, MESSAGE_BYTES)
            self._all_unread.change(max(num_bytes, MESSAGE_BYTES))
            self._on_message(self, message, frame, num_bytes)

    def _lose(self, connection: object) -> None:
        """A connection has ended; the client has a while to come back if it was the current one."""
        if self._connection is not connection:
            return
        self._connection = None
        self._share(None)
        if not self.is_over and not self._is_closing:
            self._restart_timer()
            self._is_lost = True
            self._on_connection(self, False)
            self._look_for_the_process()
        self._wake()

    def _look_for_the_process(self) -> None:
        """While the connection is lost: a process that has ended is not waited for."""
        if self.is_over or self._connection is not None or self._process is None:
            return
        if has_ended(self._process):
            self.reason = "its process has ended"
            self.finish()
        else:
            asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look_for_the_process)

    def _share(self, memory: SharedMemory | None) -> None:
        """Send large messages through this memory, for the current connection."""
        if self._memory is not None:
            self._memory.close()
        self._memory = memory
        self._conversation.ring = memory.outgoing if memory is not None else None

    def _read_shared(self, delivery: pb.Delivery) -> bytes:
        """The message in the client's memory; WireError when it shares none."""
        if self._memory is None:
            raise WireError(f"client {self.client}: a message in memory that is not shared")
        return self._memory.incoming.read(delivery.shared_start, delivery.shared_bytes)

    def _restart_timer(self) -> None:
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(self._reconnect_timeout, self.finish)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _wake(self) -> None:
        self._changed.set()
        self._room.set()
