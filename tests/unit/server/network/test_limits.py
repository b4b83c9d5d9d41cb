"""What strangers can take of a listening process: programs that try to use it up, and what is left
to the one client that has a session."""

from __future__ import annotations

import json
import queue
import resource
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from unit.server.network.loopback import Stream, manifest, session_of

from fedbert_ds.server.network import limits
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.channel import JOIN, TRAIN, connect
from fedbert_ds.wire.introduction import introduced, join

TIMEOUT = 60.0
HTTP_2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a connection begins with: the preface and an empty frame of settings."""
HALF_A_CALL = HTTP_2 + bytes([0, 0, 1, 1, 0, 0, 0, 0, 1]) + b"\x83"
"""And the first byte of a call whose headers never end."""
MB = 1 << 20


class Worker:
    """A listening process."""

    def __init__(self, **options: Any) -> None:
        program = Path(__file__).with_name("endpoint_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, str(program), json.dumps(options)], stdin=-1, stdout=-1, text=True
        )
        self.port = int(self._line())
        self.address = f"127.0.0.1:{self.port}"

    def state(self, command: str = "state") -> dict[str, Any]:
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._line())
        return answer

    def until(self, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT
        while not is_so(state := self.state()):
            assert time.monotonic() < deadline, state
            time.sleep(0.05)
        return state

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line[0].isdigit() or line[0] == "{":  # else the endpoint tells whom it refused
                return line
        raise AssertionError("it ended")


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def started(**options: Any) -> Worker:
        workers.append(Worker(**options))
        return workers[-1]

    yield started
    for worker in workers:
        worker.end()


def echoes(stream: Stream, window: int) -> bool:
    """Whether the server still hears this client and answers."""
    stream.send(manifest(window))
    return stream.receive().save.window == window


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01", HTTP_2, HALF_A_CALL], ids=["silent", "tls", "http2", "headers"])
def test_connections_that_say_too_little_use_up_no_descriptors(start: Callable[..., Worker], said: bytes) -> None:
    """Many more than the process may have; its client, its files and newcomers have theirs."""
    worker = start(descriptors=200, limits={"HANDSHAKE_SECONDS": 3.0, "IDLE_SECONDS": 3.0})
    ada = Stream(worker.address, "ada")
    assert echoes(ada, 1)
    sockets = []
    for _ in range(500):
        sockets.append(socket.create_connection(("127.0.0.1", worker.port), timeout=TIMEOUT))
        sockets[-1].sendall(said)
    state = worker.state()
    assert state["writes"] and state["descriptors"] < 150
    assert echoes(ada, 2)
    worker.until(lambda state: state["descriptors"] < 40)  # they are closed, after their time
    late = Stream(worker.address, "cy")
    assert echoes(late, 1)
    assert echoes(ada, 3) and ada.resent_bytes == 0, "over the connection it had"
    for one in sockets:
        one.close()
    ada.end()
    late.end()


def test_nothing_is_read_of_a_caller_without_a_session(start: Callable[..., Worker]) -> None:
    """Joins and streams with 100 MB each, with no introduction and with one that is not known."""
    worker = start()
    before = worker.state()["peak_mb"]
    body, nobody = bytes(100 * MB), introduced(pb.Attach(client="ada", session="guessed"))

    def attack(number: int) -> grpc.StatusCode:
        metadata = (nobody, introduced(pb.Hello(client="eve")), [])[number % 3]
        with grpc.insecure_channel(worker.address, options=[("grpc.max_send_message_length", -1)]) as channel:
            call = (channel.unary_unary(JOIN), channel.stream_stream(TRAIN))[number % 2]
            try:
                if number % 2:
                    next(call(iter([body]), timeout=TIMEOUT, metadata=metadata))
                else:
                    call(body, timeout=TIMEOUT, metadata=metadata)
            except grpc.RpcError as error:
                return error.code()
            raise AssertionError("it was let in")

    for number in range(6):
        assert attack(number) is grpc.StatusCode.FAILED_PRECONDITION
    assert worker.state()["peak_mb"] - before < 50


def test_an_introduction_of_a_megabyte_is_refused_unread(start: Callable[..., Worker]) -> None:
    worker = start()
    with connect(worker.address, None) as channel, pytest.raises(grpc.RpcError):
        join(channel, pb.Hello(client="x" * MB), TIMEOUT).result()
    assert worker.state()["joins"] == 0


def test_of_a_flood_of_joins_the_rank_hears_few(start: Callable[..., Worker]) -> None:
    worker = start(limits={"CALLS_AT_ONCE": 20.0, "CALLS_PER_SECOND": 0.001, "TURN_AWAY_SECONDS": 0.05})

    def attack(number: int) -> str:
        with connect(worker.address, None) as channel:
            reason: str = join(channel, pb.Hello(client=f"eve-{number}"), TIMEOUT).exception(timeout=TIMEOUT).details()
        return reason

    ada = Stream(worker.address, "ada")
    with ThreadPoolExecutor(5) as threads:
        reasons = Counter(threads.map(attack, range(100)))
    assert reasons == {"no": 20, "too many calls from this address; call again later": 80}
    assert worker.state()["joins"] == 20
    assert echoes(ada, 1)
    ada.end()


def test_a_client_that_takes_nothing_is_disconnected_and_the_reason_told(start: Callable[..., Worker]) -> None:
    """It has a session, reads what comes and never says that it has it."""
    worker = start(most_kept=20 * MB)
    with connect(worker.address, None) as channel:
        attach = introduced(pb.Attach(client="bo", session=session_of("bo")))
        says: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        call = channel.stream_stream(TRAIN)(iter(says.get, None), timeout=TIMEOUT, metadata=attach)
        next(call)
        for _ in range(60):
            worker.state(f"send {MB}")
        state = worker.until(lambda state: bool(state["reasons"]))
        assert state["reasons"] == ["it has left 21 MB unread, and the server keeps 21 MB for a client"]
        call.cancel()
        says.put(None)


# -- by number -------------------------------------------------------------------------------------


def test_half_of_the_descriptors_are_for_files() -> None:
    assert [limits.most_connections(most) for most in (1, 200, 1 << 20)] == [1, 100, limits.MOST_CONNECTIONS]


def test_a_process_may_have_as_many_descriptors_as_the_system_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        assert limits.raise_descriptor_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_is_kept_for_a_client_grows_with_its_half_and_its_part_of_a_window() -> None:
    small = limits.most_kept({"table": (10, 4), "bias": (3,)})
    assert small == limits.KEPT_ANYWAY_BYTES + 8 * 4 * 43
    assert limits.most_kept({}, window_bytes=1000.0) == limits.KEPT_ANYWAY_BYTES + 2000
