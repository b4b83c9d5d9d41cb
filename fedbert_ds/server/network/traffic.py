"""An endpoint's messages serialized once for all their receivers, and its bytes counted."""

from __future__ import annotations

from fedbert_ds.wire import fedbert_pb2 as pb


class Traffic:
    """Counts bytes up (from clients) and down (to clients); one thread each may count them."""

    def __init__(self) -> None:
        self._message: pb.ServerMessage | None = None
        self._body = b""
        self._up = self._down = 0
        self._taken = (0, 0)

    def count_up(self, num_bytes: int) -> None:
        """Count a message of a client."""
        self._up += num_bytes

    def serialize(self, message: pb.ServerMessage) -> bytes:
        """The message, serialized and counted, for one receiver; the next one gets the same bytes.

        It is counted here, not when it leaves, so that a window's end finds all its bytes counted.
        """
        if message is not self._message:
            self._message, self._body = message, message.SerializeToString()
        self._down += len(self._body)
        return self._body

    def take(self) -> tuple[int, int]:
        """Bytes up and down since the last call."""
        up, down = self._up, self._down
        taken = up - self._taken[0], down - self._taken[1]
        self._taken = up, down
        return taken
