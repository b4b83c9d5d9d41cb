"""Requests and answers between an EndpointProcess and its child, over a socket pair."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

SOCKET_BYTES = 4 << 20
"""Asked of the system for the socket pair: a message or two."""


class SocketChannel:
    """Sends and receives items: a head, which is a list for JSON, and a body, which is bytes.

    One thread at a time may send, and one receive.
    """

    SIZES = struct.Struct("<IQ")

    def __init__(self, sock: socket.socket) -> None:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
        self._sock = sock

    def send(self, head: list[Any], body: bytes = b"") -> None:
        """Send an item, waiting for room. Raises OSError when the other side is gone."""
        text = json.dumps(head).encode()
        self._sock.sendall(self.SIZES.pack(len(text), len(body)) + text)
        if body:
            self._sock.sendall(body)

    def receive(self) -> tuple[list[Any], bytes] | None:
        """The next item, waiting for it; None if the other side is gone or the socket timed out."""
        try:
            sizes = self._read(self.SIZES.size)
            if len(sizes) < self.SIZES.size:
                return None
            head_bytes, body_bytes = self.SIZES.unpack(sizes)
            head, body = self._read(head_bytes), self._read(body_bytes)
        except (ConnectionResetError, TimeoutError):
            # A reset: the other side was killed before it had read everything.
            return None
        if len(head) < head_bytes or len(body) < body_bytes:
            return None
        return json.loads(head), body

    def close(self) -> None:
        """The other side receives None."""
        self._sock.close()

    def _read(self, count: int) -> bytes:
        # All of it in one call, which holds no lock and makes no further copy.
        data = self._sock.recv(count, socket.MSG_WAITALL) if count else b""
        while data and len(data) < count:  # a signal came between
            more = self._sock.recv(count - len(data), socket.MSG_WAITALL)
            if not more:
                break
            data += more
        return data
