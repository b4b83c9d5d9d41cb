"""One end of a conversation across connections: messages to send, to send again, already received.

Pure bookkeeping, the same at both ends, without network, thread or clock.
"""

from __future__ import annotations

from collections import deque

from fedbert_ds.errors import WireError
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.shared_memory import LEAST_BYTES, Ring

ACKNOWLEDGE_BYTES = 1 << 20
"""Received bytes acknowledged at once, so that the other side need not keep more."""

ACKNOWLEDGE_SECONDS = 0.2
"""Longest wait before a received message is acknowledged, if no message carries it earlier."""

UNREAD_BYTES = 16 << 20
"""Received bytes waiting to be handled, beyond which a connection is not read."""

MESSAGE_BYTES = 256
"""Least size a message counts with, so that empty messages cannot pile up."""

RECONNECT_SECONDS = 60.0
"""Default time for a lost connection to come back."""


class Conversation:
    """Numbers messages, keeps them until acknowledged, passes each received one once, in order.

    A *body* is a serialized ClientMessage or ServerMessage. A *frame* is a body with its Delivery
    appended: concatenated protobuf messages are one message.
    """

    def __init__(self) -> None:
        self._unsent: deque[tuple[int, bytes]] = deque()
        self._unacknowledged: deque[tuple[int, bytes]] = deque()
        self._put = self._acknowledged = 0
        self._received = self._told = 0
        self._untold_bytes = 0
        self.ring: Ring | None = None
        """Shared memory for large bodies on this connection."""
        self.kept_bytes = 0
        """Bytes of all unacknowledged bodies, sent or not."""
        self.resent_bytes = 0
        """Bytes of bodies sent more than once, so far."""

    @property
    def received(self) -> int:
        """Messages received so far, all in order."""
        return self._received

    @property
    def is_untold(self) -> bool:
        """There are received messages to acknowledge."""
        return self._told < self._received

    @property
    def is_idle(self) -> bool:
        """Every message is acknowledged."""
        return self._acknowledged == self._put

    def put(self, body: bytes) -> None:
        """Number a message and keep it."""
        self._put += 1
        self._unsent.append((self._put, body))
        self.kept_bytes += _size(body)

    def frame(self, acknowledge: bool = False) -> bytes | None:
        """The next frame to send, or None.

        With `acknowledge`, or after ACKNOWLEDGE_BYTES, it may be an acknowledgement alone.
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
        """The answer to an Attach: messages received, and whether shared memory is open."""
        attached = pb.ServerMessage(attached=pb.Attached(shared=self.ring is not None))
        return attached.SerializeToString() + self._delivery(0)

    def take(self, delivery: pb.Delivery, num_bytes: int) -> bool:
        """Record a received frame; True if it holds a new message to handle.

        Raises WireError for a gap in the numbers or an acknowledgement of a message never sent.
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
        """Drop acknowledged messages; WireError for messages never sent."""
        if received < self._acknowledged:
            return  # older than the last one
        sent = self._unacknowledged[-1][0] if self._unacknowledged else self._acknowledged
        if received > sent:
            raise WireError(f"message {received} was acknowledged, {sent} were sent")
        if self.ring is not None:
            self.ring.free(received)
        while self._unacknowledged and self._unacknowledged[0][0] <= received:
            self.kept_bytes -= _size(self._unacknowledged.popleft()[1])
        self._acknowledged = received

    def resume(self, received: int) -> None:
        """Begin a new connection: messages after the first `received` are sent again.

        It has no ring until one is set. Raises WireError if fewer messages were received than had
        been acknowledged: the other side is not the one of this conversation.
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
