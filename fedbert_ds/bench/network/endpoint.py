"""A rank's real endpoint and real clients in processes of their own, without a model.

The endpoint checks that every client's messages come once and in order and answers each with hidden
states of a given size; clients check the same of the answers.
"""

from __future__ import annotations

import multiprocessing
import resource
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import psutil

from fedbert_ds.server.network.endpoint import Endpoint
from fedbert_ds.server.network.endpoint_process import EndpointProcess
from fedbert_ds.server.network.events import Connected, Disconnected, Received
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.stream import ServerStream

WIDTH = 768
CODEC = "int8"
BYTES_PER_TOKEN = WIDTH + 4
"""int8 and one fp32 scale a row, each way."""

spawn = multiprocessing.get_context("spawn")  # gRPC does not survive a fork


def frame_of(num_bytes: int) -> pb.TensorFrame:
    """Activations of about that many bytes, whole tokens, int8."""
    tokens = num_bytes // BYTES_PER_TOKEN
    return pb.TensorFrame(
        codec=CODEC, shape=[tokens, WIDTH], payload=bytes(tokens * WIDTH), scales=bytes(4 * tokens)
    )  # fmt: skip


@dataclass
class Usage:
    """What a process has used and counted so far."""

    cpu_seconds: float = field(default_factory=lambda: _cpu_seconds())
    python_seconds: float = 0.0
    """Of those, in Python threads of the body's process, which share one lock with the body."""
    body_seconds: float = 0.0
    """That a busy body worked, wall clock."""
    blocked_seconds: float = 0.0
    """Of those, neither on a core nor waiting for one: it waited for Python's lock."""
    child_seconds: float = 0.0
    """CPU seconds of the endpoint's own process, if it has one."""
    rss_bytes: int = field(default_factory=lambda: _rss_bytes())
    messages: int = 0
    num_bytes: int = 0
    wrong: int = 0
    """Messages that were not their client's next: lost, doubled or out of order."""
    lost_clients: int = 0


@dataclass(frozen=True)
class Load:
    """What each of a process's clients does."""

    address: str
    clients: tuple[str, ...]
    message_bytes: int
    messages: int | None = None
    """How many each sends; None goes on until `seconds` are over."""
    seconds: float = 0.0
    pause: float = 0.0
    """Seconds after every answer."""
    in_flight: int = 8
    """Messages each has sent whose answers have not come: the credit a rank gives."""
    shares_memory: bool = False
    first: int = 0
    """Number of the first message; the endpoint expects 0."""


class MeasuredEndpoint:
    """A body's process with an endpoint.

    `answer_bytes` sizes the answers; `in_process` gives the network a process of its own; with
    `busy` the body is not idle between messages, but issues small operations one after another, as
    one that launches kernels does.
    """

    def __init__(
        self, clients: tuple[str, ...], *, answer_bytes: int = 0, in_process: bool = False, busy: bool = False
    ) -> None:
        self._pipe, other = spawn.Pipe()
        arguments = (other, clients, answer_bytes, in_process, busy)
        # Not a daemon: it may have a process of its own, which ends with it.
        self._process = spawn.Process(target=_serve, args=arguments)

    def __enter__(self) -> MeasuredEndpoint:
        self._process.start()
        self.address: str = self._pipe.recv()
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.send("stop")
        self._process.join(timeout=60)

    def usage(self) -> Usage:
        """What it has used and counted so far."""
        self._pipe.send("usage")
        usage: Usage = self._pipe.recv()
        return usage


class ClientProcess:
    """Clients in one process, a thread each; `run` gives them work, `result` awaits it."""

    def __init__(self) -> None:
        self._pipe, other = spawn.Pipe()
        self._process = spawn.Process(target=_take_part, args=(other,), daemon=True)

    def __enter__(self) -> ClientProcess:
        self._process.start()
        self._pipe.recv()
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.send(None)
        self._process.join(timeout=60)

    def run(self, load: Load) -> None:
        """Begin."""
        self._pipe.send(load)

    def result(self) -> Usage:
        """What this work used: CPU seconds, and what its clients received."""
        usage = self._pipe.recv()
        if isinstance(usage, BaseException):
            raise usage
        assert isinstance(usage, Usage)
        return usage


def sessions(clients: tuple[str, ...]) -> Mapping[str, str]:
    """The session of each client."""
    return {client: f"session of {client}" for client in clients}


# -- in the endpoint's process ---


def _serve(pipe: Connection, clients: tuple[str, ...], answer_bytes: int, in_process: bool, busy: bool) -> None:
    work = _small_operations() if busy else None
    endpoint = (EndpointProcess if in_process else Endpoint)("127.0.0.1", 0, None)
    port = endpoint.start()
    endpoint.admit(dict(sessions(clients)))
    pipe.send(f"127.0.0.1:{port}")
    network_threads = [thread.native_id for thread in threading.enumerate() if thread.name.startswith("endpoint")]
    answer = frame_of(answer_bytes)
    numbers = dict.fromkeys(clients, 0)
    usage = Usage()
    while True:
        if pipe.poll():
            if pipe.recv() == "stop":
                break
            usage.cpu_seconds, usage.rss_bytes = _cpu_seconds(), _rss_bytes()
            usage.python_seconds = _thread_seconds({threading.get_native_id(), *network_threads})
            usage.child_seconds = _child_seconds()
            usage.num_bytes += endpoint.take_bytes()[0]
            pipe.send(usage)
        if work is not None:
            started, running = time.monotonic(), _running_seconds()
            work()
            seconds = time.monotonic() - started
            usage.body_seconds += seconds
            usage.blocked_seconds += max(0.0, seconds - (_running_seconds() - running))
        for _ in range(100):
            match endpoint.next_event(0.0 if busy else 0.05):
                case None:
                    break
                case Received(client, message):
                    piece = message.activations
                    usage.wrong += piece.micro_batch != numbers[client]
                    usage.messages += 1
                    hidden = pb.Hidden(micro_batch=numbers[client], values=answer)
                    numbers[client] += 1
                    endpoint.send(client, pb.ServerMessage(hidden=hidden))
                case Connected(client):
                    numbers[client] = 0
                case Disconnected():
                    usage.lost_clients += 1
    endpoint.stop(grace=1.0)


def _small_operations() -> Callable[[], None]:
    """Some milliseconds of launching operations that are over at once."""
    import torch

    torch.set_num_threads(1)
    values = torch.zeros(64)

    def work() -> None:
        for _ in range(2000):
            values.add_(1.0)

    return work


def _running_seconds() -> float:
    """Seconds this thread has spent on a core or waiting for one."""
    with open("/proc/thread-self/schedstat", encoding="ascii") as file:
        on_core, in_queue, _ = file.read().split()
    return (int(on_core) + int(in_queue)) / 1e9


# -- in a client process ---


def _take_part(pipe: Connection) -> None:
    pipe.send("ready")
    while (load := pipe.recv()) is not None:
        before = _cpu_seconds()
        results: list[Usage] = []
        errors: list[BaseException] = []
        threads = [
            threading.Thread(target=_one, args=(load, client, results, errors), daemon=True) for client in load.clients
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        total = Usage(cpu_seconds=_cpu_seconds() - before)
        total.messages = sum(usage.messages for usage in results)
        total.wrong = sum(usage.wrong for usage in results)
        pipe.send(errors[0] if errors else total)


def _one(load: Load, client: str, results: list[Usage], errors: list[BaseException]) -> None:
    try:
        results.append(_converse(load, client))
    except BaseException as error:
        errors.append(error)


def _converse(load: Load, client: str) -> Usage:
    frame = frame_of(load.message_bytes)
    usage = Usage()
    ends = time.monotonic() + load.seconds
    sent = 0
    session = sessions((client,))[client]
    with ServerStream(load.address, None, client, session, shares_memory=load.shares_memory) as stream:
        while True:
            is_more = sent < load.messages if load.messages is not None else time.monotonic() < ends
            if is_more and sent - usage.messages < load.in_flight:
                stream.send(pb.ClientMessage(activations=pb.Activations(micro_batch=load.first + sent, values=frame)))
                sent += 1
            elif usage.messages < sent:
                hidden = stream.receive().hidden
                usage.wrong += hidden.micro_batch != usage.messages
                usage.messages += 1
                if load.pause and is_more:
                    time.sleep(load.pause)
            else:
                return usage


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _thread_seconds(threads: set[int | None]) -> float:
    return sum(t.user_time + t.system_time for t in psutil.Process().threads() if t.id in threads)


def _child_seconds() -> float:
    times = [child.cpu_times() for child in psutil.Process().children()]
    return sum(time.user + time.system for time in times)


def _rss_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
