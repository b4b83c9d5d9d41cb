"""Memory shared by a client and a rank of one machine: rings, who may open it, and that nothing of
it is left.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbert_ds.errors import WireError
from fedbert_ds.server.network.endpoint import Endpoint
from fedbert_ds.server.network.events import Connected, Detached, Disconnected, Received
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire import shared_memory
from fedbert_ds.wire.shared_memory import LEAST_BYTES, RING_BYTES, SharedMemory, accept, offer
from fedbert_ds.wire.stream import ServerStream

TIMEOUT = 60.0
LARGE = 3 * LEAST_BYTES

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="shared memory needs Linux")


@pytest.fixture
def memory() -> Iterator[tuple[SharedMemory, pb.Shared]]:
    offered = offer()
    assert offered is not None
    yield offered
    offered[0].close()


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, RING_BYTES // 2)), max_size=40))
def test_a_ring_never_overwrites_what_is_not_freed(steps: list[tuple[bool, int]]) -> None:
    offered = offer()
    assert offered is not None
    mine, shared = offered
    theirs = accept(shared)
    assert theirs is not None
    waiting: deque[tuple[int, int, bytes]] = deque()
    number = 0
    for is_write, size in steps:
        if is_write:
            body = bytes([number % 251]) * size
            start = mine.outgoing.write(number, body)
            if start is not None:
                waiting.append((number, start, body))
            else:
                assert waiting, "an empty ring takes everything up to its size"
            number += 1
        elif waiting:
            done, start, body = waiting.popleft()
            assert theirs.incoming.read(start, len(body)) == body
            mine.outgoing.free(done)
    for _, start, body in waiting:
        assert theirs.incoming.read(start, len(body)) == body
    mine.close()
    theirs.close()


def test_the_two_directions_are_apart_and_full_rings_say_so(memory: tuple[SharedMemory, pb.Shared]) -> None:
    mine, shared = memory
    theirs = accept(shared)
    assert theirs is not None
    assert mine.outgoing.write(1, b"u" * RING_BYTES) == 0 and theirs.outgoing.write(1, b"d" * RING_BYTES) == 0
    assert mine.outgoing.write(2, b"x") is None
    assert theirs.incoming.read(0, RING_BYTES) == b"u" * RING_BYTES
    assert mine.incoming.read(0, RING_BYTES) == b"d" * RING_BYTES
    mine.outgoing.free(1)
    assert mine.outgoing.write(3, b"x" * (RING_BYTES + 1)) is None
    assert mine.outgoing.write(3, b"x") == 0
    theirs.close()


@pytest.mark.parametrize(("start", "count"), [(0, 0), (0, RING_BYTES + 1), (RING_BYTES, 1), (2**63, 5)])
def test_what_does_not_lie_in_a_ring_is_an_error(
    memory: tuple[SharedMemory, pb.Shared], start: int, count: int
) -> None:
    with pytest.raises(WireError, match="shared bytes"):
        memory[0].incoming.read(start, count)


def test_a_client_that_shortens_its_memory_hurts_nobody(memory: tuple[SharedMemory, pb.Shared]) -> None:
    shared = memory[1]
    theirs = accept(shared)
    assert theirs is not None
    os.truncate(shared.descriptor, 100)
    with pytest.raises(WireError, match="100 shared bytes instead of 1000"):
        theirs.incoming.read(0, 1000)
    theirs.close()


def test_nothing_else_is_opened(memory: tuple[SharedMemory, pb.Shared], tmp_path: Path) -> None:
    shared = memory[1]
    with (tmp_path / f"memfd:{shared.name} (deleted)").open("w+b") as file:
        os.truncate(file.fileno(), 2 * RING_BYTES)
        for changes in (
            {"descriptor": file.fileno()},
            {"descriptor": 0},
            {"descriptor": 4_000_000},
            {"process": 4_000_000_000},
            {"name": "fedbert-other"},
            {"name": ""},
        ):
            fields = {"process": shared.process, "descriptor": shared.descriptor, "name": shared.name}
            assert accept(pb.Shared(**(fields | changes))) is None, changes
    os.truncate(shared.descriptor, 5)
    assert accept(shared) is None, "of another size"


def own_memory() -> int:
    """How many shared memories this process has open."""
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:
            continue
    return sum(name.startswith("/memfd:fedbert-") for name in names)


CLIENT = """
import sys
from fedbert_ds.wire.stream import ServerStream
from fedbert_ds.wire import fedbert_pb2 as pb

with ServerStream(sys.argv[1], None, "ada", "session of ada") as stream:
    for number in range(10**9):
        stream.send(pb.ClientMessage(update=pb.UpdateChunk(offset=number, payload=bytes(200_000))))
"""


@pytest.mark.parametrize("shares_memory", [True, False])
def test_a_client_of_this_machine_that_is_killed_is_not_waited_for(shares_memory: bool) -> None:
    """Though a connection that is lost may come back for an hour; the process is never waited for,
    as where another process started it."""
    endpoint = Endpoint("127.0.0.1", 0, None, reconnect_timeout=3600.0, shares_memory=shares_memory)
    address = f"127.0.0.1:{endpoint.start()}"
    endpoint.admit({"ada": "session of ada"})
    client = subprocess.Popen([sys.executable, "-c", CLIENT, address])
    try:
        assert endpoint.next_event(TIMEOUT) == Connected("ada", "session of ada")
    finally:
        client.send_signal(signal.SIGKILL)
    while isinstance(event := endpoint.next_event(TIMEOUT), Received):
        pass
    assert event == Detached("ada", "session of ada")
    assert endpoint.next_event(TIMEOUT) == Disconnected("ada", "its process has ended", "session of ada")
    client.wait(timeout=TIMEOUT)
    endpoint.stop(grace=0.1)


def test_a_client_is_told_of_once_its_process_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint("127.0.0.1", 0, None)
    told_before: list[int] = []
    monkeypatch.setattr(
        "fedbert_ds.server.network.client_stream.neighbour", lambda _: told_before.append(endpoint.num_waiting)
    )
    address = f"127.0.0.1:{endpoint.start()}"
    endpoint.admit({"ada": "session of ada"})
    with ServerStream(address, None, "ada", "session of ada"):
        assert endpoint.next_event(TIMEOUT) == Connected("ada", "session of ada")
        assert told_before == [0]
    endpoint.stop(grace=0.1)


def test_a_client_that_is_killed_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[SharedMemory] = []
    monkeypatch.setattr(
        "fedbert_ds.server.network.client_stream.accept", lambda shared: opened.append(accept(shared)) or opened[-1]
    )
    before = own_memory()
    endpoint = Endpoint("127.0.0.1", 0, None, reconnect_timeout=0.1)
    address = f"127.0.0.1:{endpoint.start()}"
    endpoint.admit({"ada": "session of ada"})
    client = subprocess.Popen([sys.executable, "-c", CLIENT, address])
    try:
        assert endpoint.next_event(TIMEOUT) == Connected("ada", "session of ada")
        for _ in range(20):
            assert isinstance(endpoint.next_event(TIMEOUT), Received)
        assert len(opened) == 1 and opened[0] is not None and own_memory() == before + 1
    finally:
        client.send_signal(signal.SIGKILL)
        client.wait(timeout=TIMEOUT)
    while isinstance(event := endpoint.next_event(TIMEOUT), Received):
        pass
    assert event == Detached("ada", "session of ada")
    event = endpoint.next_event(TIMEOUT)
    assert isinstance(event, Disconnected) and event.client == "ada"
    assert own_memory() == before
    endpoint.stop(grace=0.1)
    assert not list(Path("/dev/shm").glob("*fedbert*"))


@pytest.mark.parametrize("is_refused", [False, True])
def test_messages_are_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch, is_refused: bool) -> None:
    """More than a ring holds is under way, so some go through memory and some do not; order is
    kept.
    """
    written: list[int | None] = []
    write = shared_memory.Ring.write
    monkeypatch.setattr(shared_memory.Ring, "write", lambda *args: written.append(write(*args)) or written[-1])
    before = own_memory()
    endpoint = Endpoint("127.0.0.1", 0, None, shares_memory=not is_refused)
    address = f"127.0.0.1:{endpoint.start()}"
    endpoint.admit({"ada": "session of ada"})
    count = RING_BYTES // LARGE + 20
    with ServerStream(address, None, "ada", "session of ada") as stream:
        assert endpoint.next_event(TIMEOUT) == Connected("ada", "session of ada")
        for number in range(count):
            message = pb.ServerMessage(update=pb.UpdateChunk(offset=number, payload=bytes([number % 256]) * LARGE))
            endpoint.send("ada", message)
            stream.send(pb.ClientMessage(update=message.update))
        for number in range(count):
            chunk = pb.UpdateChunk(offset=number, payload=bytes([number % 256]) * LARGE)
            assert stream.receive() == pb.ServerMessage(update=chunk)
            assert endpoint.next_event(TIMEOUT) == Received("ada", pb.ClientMessage(update=chunk), "session of ada")
    up, down = endpoint.take_bytes()
    assert count * LARGE < down == up, "bytes count as they would on a socket"
    if is_refused:
        assert written == []
    else:
        assert any(start is not None for start in written)
    assert endpoint.next_event(TIMEOUT) == Disconnected("ada", session="session of ada")
    endpoint.stop(grace=0.1)
    assert own_memory() == before


def test_where_memory_cannot_be_written_messages_go_through_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a limit of a process's file sizes, which counts for memory, too."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr("fedbert_ds.wire.shared_memory.os.pwrite", refuse)
    endpoint = Endpoint("127.0.0.1", 0, None)
    address = f"127.0.0.1:{endpoint.start()}"
    endpoint.admit({"ada": "session of ada"})
    chunk = pb.UpdateChunk(payload=b"x" * LARGE)
    with ServerStream(address, None, "ada", "session of ada") as stream:
        assert endpoint.next_event(TIMEOUT) == Connected("ada", "session of ada")
        endpoint.send("ada", pb.ServerMessage(update=chunk))
        stream.send(pb.ClientMessage(update=chunk))
        assert endpoint.next_event(TIMEOUT) == Received("ada", pb.ClientMessage(update=chunk), "session of ada")
        assert stream.receive() == pb.ServerMessage(update=chunk)
    endpoint.stop(grace=0.1)
