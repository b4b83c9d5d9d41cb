"""The process of a link: a TCP proxy that delays, limits and cuts what crosses it.

    python -m fedbert_ds.bench.network.proxy JSON

It prints its address, answers requests, and ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sys
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

READ_BYTES = 64 << 10
"""What is received at once, so the grain of the rate: 5 ms at 100 Mbit/s."""

QUEUE_SECONDS = 0.02
"""Bytes that a limited link takes in before they can leave, beyond those that are on their way."""

UNLIMITED_QUEUE_BYTES = 64 << 20


@dataclass(frozen=True)
class LinkSettings:
    """What a link does to each connection through it."""

    target: str | None = None
    """host:port; None speaks HTTP CONNECT."""
    delay_ms: float = 0.0
    """One way, half a round trip."""
    mbit: float | None = None
    """Megabits per second each way; None for no limit."""
    cut_bytes: tuple[int, int] | None = None
    """(least, most): a connection is cut after a random number of bytes, both ways counted."""
    cuts: int | None = None
    """No further cuts after so many; None for no end."""
    outage_ms: float = 0.0
    """New connections are closed at once for so long after a cut."""
    seed: int = 0


class _Side(asyncio.BufferedProtocol):
    """One socket of a connection: its bytes go to the other when the link would deliver them."""

    transport: asyncio.Transport
    other: _Side | None = None
    """None until the connection to the target is there."""

    def __init__(self, relay: _Relay, counter: str) -> None:
        self._relay = relay
        self._counter = counter
        self._buffer = bytearray(READ_BYTES)
        self._queue: deque[tuple[float, bytes]] = deque()
        self._queued = 0
        self._link_free = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._reading = self._writable = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport.pause_reading()

    def start(self, other: _Side) -> None:
        self.other = other
        self.transport.resume_reading()
        # Before Python 3.11.4 a transport reads on after a pause in `connection_made`.
        self._deliver()

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.carry(bytes(memoryview(self._buffer)[:nbytes]))

    def carry(self, data: bytes) -> None:
        """Put bytes on the link; none means the end of them."""
        relay = self._relay
        self._link_free = max(relay.loop.time(), self._link_free) + len(data) * relay.seconds_per_byte
        self._queue.append((self._link_free + relay.delay, data))
        self._queued += len(data)
        if self._reading and self._queued > relay.queue_bytes:
            self._reading = False
            self.transport.pause_reading()
        if self._timer is None:
            self._deliver()

    def _deliver(self) -> None:
        self._timer, other = None, self.other
        if other is None or not other._writable:
            return
        now = self._relay.loop.time()
        while self._queue and self._queue[0][0] <= now and other._writable:
            _, data = self._queue.popleft()
            self._queued -= len(data)
            if not data:
                if other.transport.can_write_eof() and not other.transport.is_closing():
                    # The other side may have hung up already, which is told a moment later.
                    with suppress(OSError):
                        other.transport.write_eof()
                continue
            allowed = self._relay.spend(self, len(data), self._counter)
            other.transport.write(data[:allowed])
            if allowed < len(data):
                return self._relay.cut_all([self, other])
        if self._queue and other._writable:
            self._timer = self._relay.loop.call_at(self._queue[0][0], self._deliver)
        if not self._reading and self._queued <= self._relay.queue_bytes and not self.transport.is_closing():
            self._reading = True
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        if self.other is not None and self.other._timer is None:
            self.other._deliver()

    def eof_received(self) -> bool:
        self.carry(b"")
        return True

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._queue.clear()
        self._relay.sides.discard(self)
        if self.other is not None:
            self.other.transport.abort() if error else self.other.transport.close()


class _Relay:
    """All connections of one proxy."""

    def __init__(self, settings: LinkSettings) -> None:
        self.loop = asyncio.get_running_loop()
        self.delay = settings.delay_ms / 1000
        self.seconds_per_byte = 8 / (settings.mbit * 1e6) if settings.mbit else 0.0
        self.queue_bytes = UNLIMITED_QUEUE_BYTES
        if settings.mbit:
            self.queue_bytes = int((self.delay + QUEUE_SECONDS) / self.seconds_per_byte)
        self.sides: set[_Side] = set()
        self.counts = {"connections": 0, "cuts": 0, "bytes_up": 0, "bytes_down": 0}
        self._settings = settings
        self._random = random.Random(settings.seed)
        self._left: dict[frozenset[_Side | None], int] = {}
        self._closed_until = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self) -> str:
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        if self.seconds_per_byte:
            # Accepted sockets inherit it: else the kernel would take in megabytes at full speed.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * READ_BYTES)
        listener.setblocking(False)
        self._task(self._accept(listener))
        return f"127.0.0.1:{listener.getsockname()[1]}"

    def _task(self, work: Any) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            client, _ = await self.loop.sock_accept(listener)
            client.setblocking(False)
            if self.loop.time() < self._closed_until:
                client.close()
            else:
                self._task(self._connect(client))

    async def _connect(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_INET)
        server.setblocking(False)
        try:
            target, rest = self._settings.target, b""
            if target is None:
                target, rest = await self._asked(client)
                await self.loop.sock_sendall(client, b"HTTP/1.1 200 Connection established\r\n\r\n")
            if self.seconds_per_byte:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * READ_BYTES)
            host, _, port = target.rpartition(":")
            await asyncio.sleep(2 * self.delay)  # TCP's own handshake
            await self.loop.sock_connect(server, (socket.gethostbyname(host), int(port)))
        except (OSError, ValueError):
            client.close()
            server.close()
            return
        up, down = _Side(self, "bytes_up"), _Side(self, "bytes_down")
        await self.loop.connect_accepted_socket(lambda: up, client)
        if rest:
            up.carry(rest)
        await self.loop.connect_accepted_socket(lambda: down, server)
        self.sides |= {up, down}
        self.counts["connections"] += 1
        up.start(down)
        down.start(up)

    async def _asked(self, client: socket.socket) -> tuple[str, bytes]:
        """The address in a client's CONNECT, and the bytes that came after it."""
        head = b""
        while b"\r\n\r\n" not in head and len(head) < 8192:
            data = await self.loop.sock_recv(client, 4096)
            if not data:
                raise OSError("closed")
            head += data
        request, _, rest = head.partition(b"\r\n\r\n")
        method, target, _ = request.split(b" ", 2)
        if method != b"CONNECT":
            raise ValueError(method)
        return target.decode(), rest

    def spend(self, side: _Side, count: int, counter: str) -> int:
        """How many of `count` bytes the connection carries before it is cut."""
        low_high, cuts = self._settings.cut_bytes, self._settings.cuts
        if low_high is not None and (cuts is None or self.counts["cuts"] < cuts):
            connection: frozenset[_Side | None] = frozenset((side, side.other))
            left = self._left.setdefault(connection, self._random.randint(*low_high))
            count = min(count, left)
            self._left[connection] = left - count
        self.counts[counter] += count
        return count

    def cut_all(self, sides: list[_Side], outage_ms: float | None = None) -> None:
        self.counts["cuts"] += 1
        outage = self._settings.outage_ms if outage_ms is None else outage_ms
        self._closed_until = self.loop.time() + outage / 1000
        for side in sides:
            self._left.pop(frozenset((side, side.other)), None)
            side.transport.abort()

    def answer(self, request: dict[str, Any]) -> Any:
        if "drop" in request:
            self.cut_all(list(self.sides), request["drop"])
        return self.counts


async def _serve(settings: LinkSettings, requests: IO[str], answers: IO[str]) -> None:
    relay = _Relay(settings)
    print(json.dumps(await relay.listen()), file=answers, flush=True)
    while line := await relay.loop.run_in_executor(None, requests.readline):
        print(json.dumps(relay.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is its parent's; it ends with its input
    asyncio.run(_serve(LinkSettings(**json.loads(sys.argv[1])), sys.stdin, sys.stdout))
