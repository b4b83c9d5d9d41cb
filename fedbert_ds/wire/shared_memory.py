"""Memory shared by a client and a rank on one machine, for large bodies.

The memory is a memfd; the server opens it through the client's /proc entry. It disappears with the
last of the two processes, however they end.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections import deque

from fedbert_ds.errors import WireError
from fedbert_ds.wire import fedbert_pb2 as pb

RING_BYTES = 16 << 20
"""For each direction; messages that do not fit go through the socket."""

LEAST_BYTES = 32 << 10
"""Smallest message that goes through memory."""


class Ring:
    """One direction: bodies one after another, freed in order. Each side holds a Ring."""

    def __init__(self, descriptor: int, base: int) -> None:
        self._descriptor = descriptor
        self._base = base
        self._taken: deque[tuple[int, int]] = deque()
        """Number and start of each message in use."""
        self._head = 0

    def write(self, number: int, body: bytes) -> int | None:
        """Write message `number`; returns its start. None without room, and where the system gives
        none: memory is short, or this process may write no large files.
        """
        start = self._room(len(body))
        try:
            if start is None or os.pwrite(self._descriptor, body, self._base + start) != len(body):
                return None
        except OSError:
            return None
        self._taken.append((number, start))
        self._head = start + len(body)
        return start

    def free(self, received: int) -> None:
        """Free the messages up to number `received`: the other side has read them."""
        while self._taken and self._taken[0][0] <= received:
            self._taken.popleft()

    def read(self, start: int, num_bytes: int) -> bytes:
        """A message of the other side; WireError for a place outside the memory."""
        if not 0 < num_bytes <= RING_BYTES - start:
            raise WireError(f"{num_bytes} shared bytes at {start} of {RING_BYTES}")
        # Not mapped: a client that shortens its file must not kill the server.
        body = os.pread(self._descriptor, num_bytes, self._base + start)
        if len(body) != num_bytes:
            raise WireError(f"{len(body)} shared bytes instead of {num_bytes}")
        return body

    def _room(self, num_bytes: int) -> int | None:
        if not self._taken:
            return 0 if num_bytes <= RING_BYTES else None
        tail = self._taken[0][1]
        if self._head > tail:
            if num_bytes <= RING_BYTES - self._head:
                return self._head
            return 0 if num_bytes < tail else None  # strictly, here and below: head == tail would mean empty
        return self._head if num_bytes < tail - self._head else None


class SharedMemory:
    """Both directions at one side, which writes into `outgoing` and reads from `incoming`."""

    def __init__(self, descriptor: int, is_server: bool) -> None:
        self._descriptor = descriptor
        up, down = Ring(descriptor, 0), Ring(descriptor, RING_BYTES)
        self.outgoing, self.incoming = (down, up) if is_server else (up, down)

    def close(self) -> None:
        """Close it; no reads or writes may follow."""
        os.close(self._descriptor)


def offer() -> tuple[SharedMemory, pb.Shared] | None:
    """New memory of a client, and its place for the server; None on a system without memfd."""
    if not hasattr(os, "memfd_create"):
        return None
    name = f"fedbert-{secrets.token_hex(16)}"
    try:
        descriptor = os.memfd_create(name)
        os.truncate(descriptor, 2 * RING_BYTES)
    except OSError:
        return None
    return SharedMemory(descriptor, is_server=False), pb.Shared(process=os.getpid(), descriptor=descriptor, name=name)


def accept(shared: pb.Shared) -> SharedMemory | None:
    """The memory a client offers; None if it is not there: the client runs elsewhere, or lies.

    Only a memfd of the client's random name is opened, never another file.
    """
    path = f"/proc/{shared.process}/fd/{shared.descriptor}"
    try:
        if not shared.name.startswith("fedbert-") or os.readlink(path) != f"/memfd:{shared.name} (deleted)":
            return None
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size != 2 * RING_BYTES:
        os.close(descriptor)
        return None
    return SharedMemory(descriptor, is_server=True)
