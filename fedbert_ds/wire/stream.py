"""The dialling end of a conversation; a thread dials again when a connection is lost."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from fedbert_ds.errors import ConnectionLost, WireError
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.channel import ASK_SECONDS, CONDUCT, TRAIN, TlsFiles, connect
from fedbert_ds.wire.conversation import (
    ACKNOWLEDGE_SECONDS,
    MESSAGE_BYTES,
    RECONNECT_SECONDS,
    UNREAD_BYTES,
    Conversation,
)
from fedbert_ds.wire.host_port import is_this_machine
from fedbert_ds.wire.http_proxy import proxy_note
from fedbert_ds.wire.introduction import introduced
from fedbert_ds.wire.shared_memory import SharedMemory, offer
from fedbert_ds.wire.tls import tls_fault

KEPT_BYTES = 64 << 20
"""Unacknowledged bytes beyond which `send` waits."""

BACKOFF_SECONDS = (0.1, 5.0)
"""First and longest wait before dialling again; it doubles, times 0.5 to 1.5 at random."""

FINAL = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
)
"""Refusals that dialling again does not change; any other code is a lost connection."""

LEAVE_SECONDS = 5.0
"""Longest wait for the goodbye to reach the server."""

M = TypeVar("M", bound=Message)
"""The message that is received."""
S = TypeVar("S", bound="DialledStream[Any]")


class DialledStream(Generic[M]):
    """Messages to and from the endpoint at `address`, each once and in order. Use as context
    manager.

    A lost connection is dialled again for `reconnect_timeout` seconds, while `send` and `receive`
    wait. Both belong to one thread. Dialling ends at once when `is_over` says that nobody is left
    who knows this session; it is not asked while there is a connection. `M` has `attached` and
    `delivery` as a ServerMessage has them.
    """

    call: ClassVar[str]
    """The gRPC call that is dialled."""
    message_type: type[M]
    other_side: ClassVar[str] = "the server"
    this_side: ClassVar[str] = "this client"

    def __init__(
        self,
        address: str,
        tls: TlsFiles | None,
        client: str,
        session: str,
        reconnect_timeout: float = RECONNECT_SECONDS,
        shares_memory: bool = True,
        token: str = "",
        is_over: Callable[[], bool] | None = None,
    ) -> None:
        self._address = address
        self._tls = tls
        self._client = client
        self._session = session
        self._token = token
        """That a local client has of its launcher."""
        self._reconnect_timeout = reconnect_timeout
        self._shares_memory = shares_memory and is_this_machine(address)
        self._memory: SharedMemory | None = None
        """Offered on this connection; the server may have opened it for large messages."""
        self._conversation = Conversation()
        self._changed = threading.Condition()
        self._unread: deque[tuple[M, int]] = deque()
        self._unread_bytes = 0
        self._connection = 0
        """Number of this connection; the generator of an older one ends."""
        self._attached = False
        """The server has answered on this connection."""
        self._waits_to_send = False
        self._left = False
        self._ended: WireError | None = None
        self._call: grpc.Call | None = None
        self._is_over = is_over
        self._thread = threading.Thread(target=self._run, name=f"stream of {client}", daemon=True)

    def __enter__(self: S) -> S:
        self._thread.start()
        self._start_to_watch()
        return self

    def __exit__(self, *error: object) -> None:
        """Say goodbye after the messages sent, wait up to LEAVE_SECONDS for that, hang up."""
        with self._changed:
            self._left = True
            if self._ended is None:
                self._conversation.put(pb.ClientMessage(leave=pb.Leave()).SerializeToString())
            self._changed.notify_all()
        self._thread.join(timeout=LEAVE_SECONDS)
        self._hang_up()
        self._thread.join(timeout=LEAVE_SECONDS)

    @property
    def resent_bytes(self) -> int:
        """Bytes of messages sent more than once, so far."""
        return self._conversation.resent_bytes

    @property
    def is_idle(self) -> bool:
        """The server has acknowledged every message."""
        return self._conversation.is_idle

    def send(self, message: Message) -> None:
        """Queue a message; waits while KEPT_BYTES are unacknowledged. Dropped after the end."""
        body = message.SerializeToString()
        with self._changed:
            self._waits_to_send = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._conversation.kept_bytes < KEPT_BYTES or self._ended is not None)
            self._waits_to_send = False
            if self._ended is None:
                self._conversation.put(body)
            self._changed.notify_all()

    def receive(self) -> M:
        """Wait for the next message; WireError with the reason once the stream has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._unread or self._ended is not None)
            if not self._unread:
                assert self._ended is not None
                raise self._ended
            message, num_bytes = self._unread.popleft()
            self._unread_bytes -= num_bytes
            self._changed.notify_all()
            return message

    # -- in the stream's thread, and gRPC's --------------------------------------------------------

    def _run(self) -> None:
        first, longest = BACKOFF_SECONDS
        lost_at, backoff = time.monotonic(), first
        was_attached = False
        while True:
            outcome = self._talk()
            if self._attached:
                lost_at, backoff, was_attached = time.monotonic(), first, True
            elif not was_attached and outcome is not None and outcome.code() is grpc.StatusCode.UNAVAILABLE:
                self._look_at_tls()
            with self._changed:
                self._connection += 1
                if self._attached:
                    self._attached = False
                    self._start_to_watch()
                self._conversation.ring = None
                if self._memory is not None:
                    self._memory.close()
                    self._memory = None
                is_final = outcome is None or outcome.code() in FINAL
                if self._ended is None and (is_final or self._gave_up(lost_at)):
                    self._ended = self._why(outcome)
                self._changed.notify_all()
                self._changed.wait_for(
                    lambda: self._left or self._ended is not None, timeout=backoff * random.uniform(0.5, 1.5)
                )
                if self._ended is not None:
                    return
            backoff = min(2 * backoff, longest)

    def _gave_up(self, lost_at: float) -> bool:
        patience = LEAVE_SECONDS if self._left else self._reconnect_timeout
        return time.monotonic() - lost_at > patience

    def _start_to_watch(self) -> None:
        """In a thread of its own: one dial of a machine that is gone takes 20 s, and a question
        about a file may take long.
        """
        if self._is_over is not None:
            threading.Thread(target=self._watch, args=(self._is_over,), daemon=True).start()

    def _watch(self, is_over: Callable[[], bool]) -> None:
        """Until there is a connection: end the stream as soon as its session is over."""

        def is_done() -> bool:
            return self._attached or self._ended is not None

        while not is_over():
            with self._changed:
                if self._changed.wait_for(is_done, timeout=ASK_SECONDS):
                    return
        with self._changed:
            if is_done():
                return
            self._ended = ConnectionLost(
                f"{self._address}: connection lost, and the run has ended or started again since; "
                f"start {self.this_side} again"
            )
        self._hang_up()

    def _look_at_tls(self) -> None:
        """End with the reason, if TLS keeps the two sides apart: dialling again changes nothing."""
        if (fault := tls_fault(self._address, self._tls)) is not None:
            with self._changed:
                if self._ended is None:
                    self._ended = WireError(f"{self._address}: {fault}")

    def _talk(self) -> grpc.RpcError | None:
        """One connection, to its end; None if the server ended the stream in good order, or this
        side cannot dial.
        """
        attach = pb.Attach(
            client=self._client, session=self._session, received=self._conversation.received, token=self._token
        )
        if self._shares_memory and (offered := offer()) is not None:
            self._memory, shared = offered
            attach.shared.CopyFrom(shared)
        try:
            channel = connect(self._address, self._tls)
        except WireError as error:  # its own certificate has expired, say
            self._ended = error
            return None
        with channel:
            call = channel.stream_stream(self.call)(self._frames(self._connection), metadata=introduced(attach))
            self._call = call
            if self._ended is not None:  # by a thread that knew no call, or the one before
                call.cancel()
            try:
                for frame in call:
                    self._take(frame)
            except grpc.RpcError as error:
                return error
            except (WireError, DecodeError) as error:
                with self._changed:
                    self._ended = WireError(
                        f"{self._address}: {self.other_side} broke the protocol ({error}); install the same fedbert-ds"
                    )
                    self._changed.notify_all()
                call.cancel()
        return None

    def _frames(self, connection: int) -> Iterator[bytes]:
        """Messages and acknowledgements of a connection, once the server has answered."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._attached or self._connection != connection)
                frame = self._conversation.frame() if self._connection == connection else None
                if frame is None and self._connection == connection:
                    untold = self._conversation.is_untold
                    woken = self._changed.wait(timeout=ACKNOWLEDGE_SECONDS if untold else None)
                    frame = self._conversation.frame(acknowledge=not woken)
                if self._connection != connection:
                    return
            if frame is not None:
                yield frame

    def _take(self, frame: bytes) -> None:
        message: Any = self.message_type.FromString(frame)
        delivery = message.delivery
        num_bytes = max(len(frame), delivery.shared_bytes, MESSAGE_BYTES)
        if delivery.shared_bytes:
            if self._memory is None:
                raise WireError("a message in memory that is not shared")
            body = self._memory.incoming.read(delivery.shared_start, delivery.shared_bytes)
            message = self.message_type.FromString(body)
        with self._changed:
            if not self._attached:
                self._conversation.resume(delivery.received)
                if message.attached.shared and self._memory is not None:
                    self._conversation.ring = self._memory.outgoing
                self._attached = True
            if self._conversation.take(delivery, num_bytes):
                message.ClearField("delivery")
                self._unread.append((message, num_bytes))
                self._unread_bytes += num_bytes
            self._changed.notify_all()
            # Reads on while `send` waits, because the acknowledgements it waits for come here.
            self._changed.wait_for(
                lambda: self._unread_bytes < UNREAD_BYTES or self._waits_to_send or self._left,
            )

    def _hang_up(self) -> None:
        with self._changed:
            if self._ended is None:
                self._ended = WireError(f"{self._address}: {self.this_side} left the stream")
            self._changed.notify_all()
        if self._call is not None:
            self._call.cancel()

    def _why(self, error: grpc.RpcError | None) -> WireError:
        if error is None:
            return ConnectionLost(
                f"{self._address}: {self.other_side} ended the stream; look at its output, then start "
                f"{self.this_side} again"
            )
        code, details = error.code(), error.details() or "no details"
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            # It has restarted, or went on without this side: the session is over, not the run.
            return ConnectionLost(f"{self.other_side} refused {self.this_side}: {details}")
        kind = WireError if code in FINAL else ConnectionLost
        note = proxy_note(self._address) if code is grpc.StatusCode.UNAVAILABLE else ""
        return kind(
            f"{self._address}: connection lost ({code.name.lower()}: {details}); start {self.this_side} again{note}"
        )


class ServerStream(DialledStream[pb.ServerMessage]):
    """A client's conversation with its rank."""

    call = TRAIN
    message_type = pb.ServerMessage


class AggregatorStream(ServerStream):
    """A client's conversation with an aggregator of another party."""

    other_side = "the aggregator"


class ControlStream(DialledStream[pb.Report]):
    """A rank's conversation with an aggregator of another party."""

    call = CONDUCT
    message_type = pb.Report
    other_side = "the aggregator"
    this_side = "this rank"
