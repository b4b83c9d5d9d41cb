"""An endpoint's child process: it serves, it dies and is reported, and it outlives nobody."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from unit.server.network.loopback import TIMEOUT, Listening, Stream, listening, manifest, save, session_of

from fedbert_ds.errors import WireError
from fedbert_ds.server.network import endpoint_process
from fedbert_ds.server.network.endpoint_process import EndpointProcess
from fedbert_ds.server.network.events import Connected, Received
from fedbert_ds.wire import fedbert_pb2 as pb

PARENT = """
import psutil
from fedbert_ds.server.network.endpoint_process import EndpointProcess

endpoint = EndpointProcess("127.0.0.1", 0, None)
port = endpoint.start()
endpoint.admit({"ada": "session of ada"})
print(port, psutil.Process().children()[0].pid, flush=True)
while True:
    endpoint.next_event(60.0)
"""


@pytest.fixture(autouse=True)
def clients_leave_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody answers them here when they leave."""
    monkeypatch.setattr("fedbert_ds.wire.stream.LEAVE_SECONDS", 0.1)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children() if is_alive(child.pid)}


@pytest.fixture
def endpoint() -> Iterator[tuple[Listening, int]]:
    """A started endpoint and its child's process id."""
    before = children()
    with listening(EndpointProcess) as started:
        (child,) = children() - before
        yield started, child
    assert children() <= before, "the child is gone"


def is_alive(process_id: int) -> bool:
    try:
        return psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_child_serves_on_through_the_signals_that_stop_a_run(endpoint: tuple[Listening, int]) -> None:
    """A scheduler signals the whole group; the rank saves first, with its clients."""
    started, child = endpoint
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        psutil.Process(child).send_signal(number)
    ada = Stream(started.address, "ada")
    assert started.event() == Connected("ada", session_of("ada"))
    ada.send(manifest(1))
    assert started.event() == Received("ada", manifest(1), session_of("ada"))
    started.real.send("ada", save(2))
    assert ada.receive() == save(2)
    ada.end()


def test_a_killed_child_is_one_line(endpoint: tuple[Listening, int], capfd: pytest.CaptureFixture[str]) -> None:
    started, child = endpoint
    ada = Stream(started.address, "ada")
    assert started.event() == Connected("ada", session_of("ada"))
    psutil.Process(child).kill()
    for _ in range(2):
        with pytest.raises(WireError, match=r"^127\.0\.0\.1:0: the endpoint's process ended; look at its output$"):
            started.real.next_event(TIMEOUT)
    # Nothing of this waits for the dead.
    started.real.send("ada", save(1))
    started.real.admit({})
    started.real.revoke("ada")
    started.real.close("ada", save(2))
    started.real.stop()
    started.real.stop()
    ada.end()
    assert capfd.readouterr() == ("", "")


def test_a_killed_parent_ends_the_child(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with output.open("w") as file:
        parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=file, text=True)
    assert parent.stdout is not None
    port, child = map(int, parent.stdout.readline().split())
    ada = Stream(f"127.0.0.1:{port}", "ada")
    for window in range(100):
        ada.send(manifest(window))
    parent.kill()
    parent.wait(timeout=TIMEOUT)
    for window in range(100):  # the child has more to report, to nobody
        ada.send(manifest(window))
    wait_until(lambda: not is_alive(child))
    ada.end()
    assert output.read_text() == "", "no traceback"


def test_a_child_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    before = children()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    endpoint = EndpointProcess("127.0.0.1", 7000, None)
    with pytest.raises(WireError, match=r"^127\.0\.0\.1:7000: the endpoint's process did not start; see its output$"):
        endpoint.start()
    endpoint.stop()
    assert children() <= before


def test_stop_does_not_wait_for_events_that_nobody_takes(
    endpoint: tuple[Listening, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    started, child = endpoint
    monkeypatch.setattr(endpoint_process, "UNREAD_BYTES", 1000)
    ada = Stream(started.address, "ada", session_of("ada"))
    assert started.event() == Connected("ada", session_of("ada"))
    for _ in range(20):
        ada.send(pb.ClientMessage(update=pb.UpdateChunk(payload=bytes(500))))
    wait_until(lambda: started.real.num_waiting >= 2)
    assert started.real.num_waiting <= 3, "more wait in the child"
    started.real.stop(grace=0.1)
    assert not is_alive(child)
    ada.end()
