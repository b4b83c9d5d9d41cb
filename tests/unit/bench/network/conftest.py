"""A server that echoes, and how to talk to it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def echo() -> Iterator[str]:
    """A server that sends back what it receives, until the other end stops sending."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


@pytest.fixture(scope="session")
def dial() -> Callable[[str], socket.socket]:
    """Connects to host:port."""

    def connect(address: str) -> socket.socket:
        host, _, port = address.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=30)

    return connect


@pytest.fixture(scope="session")
def round_trip() -> Callable[[socket.socket, bytes], bytes]:
    """Sends, stops sending, and reads to the end; what came before a cut if there is one."""

    def exchange(connection: socket.socket, payload: bytes) -> bytes:
        def send() -> None:
            try:
                connection.sendall(payload)
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        received = bytearray()
        try:
            while data := connection.recv(1 << 16):
                received += data
        except OSError:
            pass
        sender.join(timeout=30)
        return bytes(received)

    return exchange
