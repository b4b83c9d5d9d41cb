"""One end of a conversation that outlives its connections: what to send, what to send again, what came before already.

Pure bookkeeping, the same at both ends: no network, no thread and no clock inside.
"""

from __future__ import annotations

from collections import deque

from fedbert_ds.errors import WireError
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.shared_memory import LEAST_BYTES, Ring

ACKNOWLEDGE_BYTES = 1 << 20
"""Received bytes after which the other side is told at once, so that it need not keep them."""

ACKNOWLEDGE_SECONDS = 0.2
"""How long a received message may go untold while there is nothing to send that could tell it on the way."""

UNREAD_BYTES = 16 << 20
"""Received bytes that may wait to be handled; beyond them the connection is not read, which slows the other side."""

MESSAGE_BYTES = 256
"""What a message counts at least, so that empty ones cannot pile up either."""

RECONNECT_SECONDS = 60.0
"""How long a lost connection may take to come back, when the run file says nothing else."""


class Conversation:
    """Numbers messages, keeps them until they are acknowledged, and lets each of the other side's pass once, in order.

    A *body* is a serialized ClientMessage or ServerMessage; a *frame* is a body with its Delivery, which is appended:
    concatenated protobuf messages are one message.
    """

    def __init__(self) -> None:
        self._unsent: deque[tuple[int, bytes]] = deque()
        self._unacknowledged: deque[tuple[int, bytes]] = deque()
        self._put = self._acknowledged = 0
        self._received = self._told = 0
        self._untold_bytes = 0
        self.ring: Ring | None = None
        """Where large bodies go on this connection, instead of into their frames."""
        self.kept_bytes = 0
        """Of all bodies that the other side has not acknowledged, sent or not."""
        self.resent_bytes = 0
        """Of bodies that were sent more than once, so far."""

    @property
    def received(self) -> int:
        """Messages of the other side that have come, all in order."""
        return self._received

    @property
    def is_untold(self) -> bool:
        """Messages have come which the other side does not know to have come."""
        return self._told < self._received

    @property
    def is_idle(self) -> bool:
        """Everything that was put has been acknowledged."""
        return self._acknowledged == self._put

    def put(self, body: bytes) -> None:
        """Number a message and keep it."""
        self._put += 1
        self._unsent.append((self._put, body))
        self.kept_bytes += _size(body)

    def frame(self, acknowledge: bool = False) -> bytes | None:
        """The next frame to write; None if there is nothing to say.

        With `acknowledge`, a frame that says no more than what came counts as something to say; after much has come
        it does anyway.
        """
        if self._unsent:
            number, body = self._unsent.popleft()
            self._unacknowledged.append((number, body))
            if self.ring is not None and len(body) >= LEAST_BYTES:
                start = self.ring.write(number, body)
                if start is not None:
                    return self._delivery(number, start, len(body))
            return body + self._delivery(number)
        if self.is_untold and (acknowledge or self._untold_bytes >= ACKNOWLEDGE_BYTES):
            return self._delivery(0)
        return None

    def greeting(self) -> bytes:
        """The frame that answers an Attach: how much has come, and whether there is shared memory."""
        attached = pb.ServerMessage(attached=pb.Attached(shared=self.ring is not None))
        return attached.SerializeToString() + self._delivery(0)

    def take(self, delivery: pb.Delivery, num_bytes: int) -> bool:
        """Take note of a frame that came; whether its message is one to handle: numbered, and new.

        Raises WireError for a number that is not the next, or an acknowledgement of what was never sent.
        """
        self.acknowledge(delivery.received)
        if delivery.sequence == 0 or delivery.sequence <= self._received:
            return False
        if delivery.sequence != self._received + 1:
            raise WireError(f"message {delivery.sequence} came after message {self._received}")
        self._received += 1
        self._untold_bytes += max(num_bytes, MESSAGE_BYTES)
        return True

    def acknowledge(self, received: int) -> None:
        """Forget messages that the other side has; WireError if it cannot have them."""
        if received < self._acknowledged:
            return  # From before a later frame; nothing new.
        sent = self._unacknowledged[-1][0] if self._unacknowledged else self._acknowledged
        if received > sent:
            raise WireError(f"message {received} was acknowledged, {sent} were sent")
        if self.ring is not None:
            self.ring.free(received)
        while self._unacknowledged and self._unacknowledged[0][0] <= received:
            self.kept_bytes -= _size(self._unacknowledged.popleft()[1])
        self._acknowledged = received

    def resume(self, received: int) -> None:
        """A new connection, on whose other end `received` messages have come: what was sent after them goes again.

        It has no ring until one is set.
        Raises WireError when that cannot be: the other side is not the one that this conversation was with.
        """
        if received < self._acknowledged:
            raise WireError(f"{received} messages were received, {self._acknowledged} had been acknowledged")
        self.acknowledge(received)
        self.ring = None
        self.resent_bytes += sum(len(body) for _, body in self._unacknowledged)
        self._unsent.extendleft(reversed(self._unacknowledged))
        self._unacknowledged.clear()

    def _delivery(self, sequence: int, shared_start: int = 0, shared_bytes: int = 0) -> bytes:
        self._told, self._untold_bytes = self._received, 0
        delivery = pb.Delivery(
            sequence=sequence, received=self._received, shared_start=shared_start, shared_bytes=shared_bytes
        )
        frame: bytes = pb.ServerMessage(delivery=delivery).SerializeToString()  # the same field in a ClientMessage
        return frame


def _size(body: bytes) -> int:
    return max(len(body), MESSAGE_BYTES)
