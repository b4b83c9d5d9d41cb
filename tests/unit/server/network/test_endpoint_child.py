"""The child's two threads, `obey` and `tell`, between a listener that records and a socket pair."""

from __future__ import annotations

import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from fedbert_ds.errors import WireError
from fedbert_ds.server.network.endpoint_child import EndpointChild, received_frame
from fedbert_ds.server.network.events import Attached, Connected, Detached, Disconnected, JoinAbandoned, JoinAsked
from fedbert_ds.server.network.socket_channel import SocketChannel
from fedbert_ds.wire import fedbert_pb2 as pb

TIMEOUT = 20.0
STREAM: Any = SimpleNamespace(client="ada", session="s")


class FakeListener:
    """Records calls; its events come from a queue."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments))

    def next_event(self, timeout: float) -> Any:
        try:
            return self.events.get(timeout=timeout)
        except queue.Empty:
            return None


class Running:
    """A child whose threads run, and the channel of the process that started it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(TIMEOUT)
        self.channel = SocketChannel(ours)
        self.listener = FakeListener()
        child = EndpointChild(SocketChannel(theirs), self.listener)  # type: ignore[arg-type]
        self._theirs = theirs
        self._threads = [threading.Thread(target=work) for work in (child.obey, child.tell)]
        for thread in self._threads:
            thread.start()

    def ends(self) -> None:
        for thread in self._threads:
            thread.join(timeout=TIMEOUT)
            assert not thread.is_alive()
        self._theirs.close()


@pytest.fixture
def child() -> Iterator[Running]:
    running = Running()
    yield running
    running.channel.close()
    running.ends()


def test_commands_are_carried_out_in_order(child: Running) -> None:
    child.channel.send(["admit", {"ada": "s"}])
    assert child.channel.receive() == (["admitted"], b"")
    child.channel.send(["send", "ada"], b"one")
    child.channel.send(["close", "ada"], b"two")
    child.channel.send(["revoke", "ada"])
    child.channel.send(["stop", 1.5])
    child.ends()
    assert child.listener.calls == [
        ("admit", {"ada": "s"}), ("send_body", "ada", b"one"), ("close_body", "ada", b"two"),
        ("revoke", "ada"), ("stop", 1.5),
    ]  # fmt: skip


def test_without_the_other_process_it_stops_at_once(child: Running) -> None:
    for _ in range(3):
        child.listener.events.put(Connected("ada"))
    child.channel.close()
    child.listener.events.put(received_frame(STREAM, pb.ClientMessage(), bytes(100), 98))
    child.ends()
    assert child.listener.calls == [("stop", 0.0)]


def test_events_are_reported_in_order_and_frames_as_they_came(child: Running) -> None:
    child.listener.events.put(Connected("ada", "s"))
    child.listener.events.put(received_frame(STREAM, pb.ClientMessage(), b"a frame", 5))
    for event in (Detached("ada", "s"), Attached("ada", "s"), Disconnected("ada", "so", "s")):
        child.listener.events.put(event)
    reported = [child.channel.receive() for _ in range(5)]
    assert reported == [
        (["connected", "ada", "s"], b""),
        (["received", "ada", "s", 5], b"a frame"),
        (["detached", "ada", "s"], b""),
        (["attached", "ada", "s"], b""),
        (["disconnected", "ada", "s", "so"], b""),
    ]


def test_joins_get_the_answer_with_their_number(child: Running) -> None:
    asked = [JoinAsked(pb.Hello(client=name), Future()) for name in ("ada", "bo", "cy")]
    numbers = []
    for join in asked:
        child.listener.events.put(join)
        received = child.channel.receive()
        assert received is not None
        (kind, number), body = received
        assert kind == "join" and pb.Hello.FromString(body) == join.hello
        numbers.append(number)
    child.channel.send(["refuse", numbers[1], "no text"])
    child.channel.send(["welcome", numbers[0]], pb.Welcome(endpoint="here:3").SerializeToString())
    assert asked[0].answer.result(timeout=TIMEOUT) == pb.Welcome(endpoint="here:3")
    with pytest.raises(WireError, match="no text"):
        asked[1].answer.result(timeout=TIMEOUT)
    child.listener.events.put(JoinAbandoned(asked[2].hello))
    assert child.channel.receive() == (["abandoned", numbers[2]], b"")
    child.channel.send(["welcome", numbers[2]], b"")  # crossed on the way
    child.channel.send(["admit", {}])
    assert child.channel.receive() == (["admitted"], b"")
    assert not asked[2].answer.done()


def test_the_child_imports_no_torch() -> None:
    check = "import sys, fedbert_ds.server.network.endpoint_child; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0
