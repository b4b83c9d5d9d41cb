"""What surrounds a rank, without DeepSpeed, processes or network: engine, rank group, an endpoint,
a clock.
"""

from __future__ import annotations

import heapq
import itertools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from unit.server.fake_client import HALF, WIDTH, FakeClient

from fedbert_ds.config import RunConfig
from fedbert_ds.federation.aggregator import Aggregator
from fedbert_ds.federation.strategy import strategy_of_run
from fedbert_ds.run_file import parse_config
from fedbert_ds.server.admission import Expectation, Invitation, Members, Seat
from fedbert_ds.server.body.device_work import DeviceWork
from fedbert_ds.server.body.packed_input import BodyInput
from fedbert_ds.server.checkpoint import Checkpoints
from fedbert_ds.server.checkpoint_folder import CheckpointFolder, Layout
from fedbert_ds.server.contract import Contract, RankStatus, TensorContract
from fedbert_ds.server.evaluations import Evaluations
from fedbert_ds.server.hand_over import collect_client_model
from fedbert_ds.server.network.decoding import DecodedEvent, decoded
from fedbert_ds.server.network.events import Connected, Disconnected, Event, JoinAsked, Received
from fedbert_ds.server.network.sessions import Sessions
from fedbert_ds.server.newcomers import Newcomers, Reception, no_joins_here
from fedbert_ds.server.queue.in_flight import InFlightLimits
from fedbert_ds.server.rank import RankServer
from fedbert_ds.server.rank_messages import RankMessages
from fedbert_ds.server.rooms import Ground, build_rooms
from fedbert_ds.server.stop_signal import StopFlag
from fedbert_ds.telemetry.trace import Trace
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.messages import PROTOCOL
from fedbert_kernels.encoded import Encoded


class FakeEngine:
    """A body that doubles what it is given, and counts: easy to tell from any other function."""

    zero_stage = 2
    num_parameters = 1000
    lost_gradient = False
    most = math.inf
    """Results beyond it are not finite."""

    def __init__(
        self,
        clock: Clock | None = None,
        seconds: float = 0.0,
        lockstep_forwards: bool = False,
        device_work: Callable[[Encoded, float], DeviceWork] = DeviceWork,
    ) -> None:
        self.lockstep_forwards = lockstep_forwards
        self.steps: list[float] = []
        self.saved: list[int] = []
        self.loaded: list[int] = []
        self.dropped: list[int] = []
        """Backwards that were undone, each time that gradients were dropped."""
        self.backwards: list[int] = []
        self.left_out: list[tuple[int, Sequence[slice]]] = []
        """By `blank`."""
        self.tokens = 0
        self._clock, self._seconds = clock, seconds
        self._device_work = device_work
        self._inputs: dict[int, BodyInput] = {}
        self._since_step = 0

    def forward(self, micro_batch: int, body_input: BodyInput, codec: str = "fp32") -> DeviceWork:
        self._work()
        assert micro_batch not in self._inputs
        self._inputs[micro_batch] = body_input
        bounds = body_input.cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds == sorted(set(bounds)), "every sequence has tokens"
        per_token = self._per_token(body_input, Encoded.join(body_input.activations).decode())
        assert len(per_token) == bounds[-1]
        self.tokens += len(per_token)
        return self._result(2.0 * per_token[body_input.masked_positions], codec)

    def evaluate(self, body_input: BodyInput, codec: str = "fp32") -> DeviceWork:
        self._work()
        per_token = self._per_token(body_input, Encoded.join(body_input.activations).decode())
        assert len(per_token) == int(body_input.cu_seqlens[-1])
        return self._result(2.0 * per_token[body_input.masked_positions], codec)

    def blank(self, micro_batch: int, rows: Sequence[slice]) -> None:
        assert micro_batch in self._inputs
        self.left_out.append((micro_batch, rows))

    def backward(self, micro_batch: int, parts: Sequence[Encoded], codec: str = "fp32") -> DeviceWork:
        self._work()
        body_input = self._inputs.pop(micro_batch)
        hidden_gradient = Encoded.join(parts).decode()
        assert hidden_gradient.shape == (len(body_input.masked_positions), WIDTH)
        self.backwards.append(micro_batch)
        self._since_step += 1
        leaf = Encoded.join(body_input.activations).decode().clone().requires_grad_()
        hidden = 2.0 * self._per_token(body_input, leaf)[body_input.masked_positions]
        hidden.backward(hidden_gradient)
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        return self._device_work(Encoded.of(gradient, codec), self._seconds)

    def step(self, learning_rate: float, client_norm: float = 0.0) -> float:
        assert not self._inputs, "a step inside a window"
        self.steps.append(learning_rate)
        self._since_step = 0
        return 1.0

    def drop_gradients(self) -> None:
        assert not self._inputs, "inside a window"
        self.dropped.append(self._since_step)
        self._since_step = 0

    def dummy_input(self, width: int, with_rows: bool, seed: int) -> BodyInput:
        index = torch.zeros(1, dtype=torch.int64) if with_rows else None
        nowhere = torch.zeros(0, dtype=torch.int64)
        return BodyInput(
            [Encoded.zeros(1, width, "fp32")], nowhere, torch.tensor([0, 1], dtype=torch.int32), index, seed
        )

    def save(self, folder: Path, window: int) -> None:
        self.saved.append(window)

    def load(self, folder: Path, window: int, ranks: int, stage: int) -> None:
        assert stage == self.zero_stage
        self.loaded.append(window)
        self._since_step = 0

    def affordable_in_flight(self) -> int:
        return 8

    def take_recompiles(self) -> int:
        return 0

    def _per_token(self, body_input: BodyInput, values: Tensor) -> Tensor:
        return values if body_input.row_index is None else values[body_input.row_index]

    def _result(self, hidden: Tensor, codec: str) -> DeviceWork:
        finite = torch.where(hidden.abs() > self.most, torch.nan, hidden)
        return self._device_work(Encoded.of(finite, codec), self._seconds)

    def _work(self) -> None:
        if self._clock is not None:
            self._clock.now += self._seconds


def retold(value: Any, kind: Any) -> Any:
    """A value as another rank hears it."""
    messages = RankMessages(b"a secret")
    return messages.unpack(messages.pack(value, kind, 0), kind, 0)


class FakeRankGroup:
    """The only rank."""

    rank, world_size, group, update_group = 0, 1, None, None

    def gather(self, mine: Any, kind: Any) -> list[Any]:
        return [retold(mine, kind)]

    def gather_beside(self, mine: Any, kind: Any) -> list[Any]:
        return self.gather(mine, kind)

    def broadcast(self, from_rank_0: Any, kind: Any) -> Any:
        return self.gather(from_rank_0, kind)[0]

    def barrier(self) -> None:
        pass


class InlineThread:
    """Does at once what a thread would do, so that nothing depends on which is faster."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def shutdown(self, wait: bool, cancel_futures: bool) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(function(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done


class Clock:
    """Seconds that pass only when somebody waits or works."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


Latency = Callable[[str, Event], float]
"""Seconds after its last event that an event of a client arrives."""


class FakeEndpoint:
    """An endpoint whose clients answer `latency` seconds later; a wait moves the clock."""

    def __init__(self, clock: Clock, clients: list[FakeClient], latency: Latency) -> None:
        self.clock = clock
        self.clients = {client.name: client for client in clients}
        self.sent: list[tuple[str, pb.ServerMessage]] = []
        self.closed: set[str] = set()
        self.revoked: set[str] = set()
        self.sessions = {name: seat.session for name, seat in seats(clients).items()}
        """Of the clients that were admitted."""
        self.on_gone: Callable[[str], None] = lambda client: None
        """Called when the connection of a client breaks."""
        self._latency = latency
        self._arrival: dict[str, float] = {}
        self._count = itertools.count()
        self._events: list[tuple[float, int, Event]] = []
        for client in clients:
            self.post(client.name, Connected(client.name))

    def post(self, client: str, event: Event) -> None:
        """An event of a client, after those before; if none is named, of its session."""
        if getattr(event, "session", None) == "":
            event = replace(event, session=self.sessions.get(client, "one that is over"))  # type: ignore[type-var]
        arrival = max(self.clock.now, self._arrival.get(client, 0.0)) + self._latency(client, event)
        self._arrival[client] = arrival
        heapq.heappush(self._events, (arrival, next(self._count), event))

    def next_event(self, timeout: float) -> Event | None:
        if self._events and self._events[0][0] <= self.clock.now + timeout:
            arrival, _, event = heapq.heappop(self._events)
            self.clock.now = max(self.clock.now, arrival)
            return event
        self.clock.now += timeout
        assert self.clock.now < 1e6, "the rank waits for ever"
        return None

    def send(self, client: str, message: pb.ServerMessage) -> None:
        self.sent.append((client, message))
        if client in self.closed:
            return
        for answer in self.clients[client].handle(message):
            if answer.WhichOneof("body") is None:  # an altered answer that stands for a lost connection
                self.closed.add(client)
                self.post(client, Disconnected(client))
                self.on_gone(client)
                return
            self.post(client, Received(client, answer))

    def close(self, client: str, last: pb.ServerMessage) -> None:
        self.send(client, last)
        self.closed.add(client)

    def admit(self, sessions: dict[str, str]) -> None:
        self.sessions.update(sessions)

    def revoke(self, client: str) -> None:
        self.revoked.add(client)
        self.sessions.pop(client, None)

    def join(self, client: FakeClient, seconds: float = 0.0, **hello: Any) -> Future[pb.Welcome]:
        """A client asks to join after so many seconds, and opens its stream when it is let in."""
        event, answer = joined(hello_of(client.name, **hello))

        def welcomed(done: Future[pb.Welcome]) -> None:
            if done.exception() is None:
                assert done.result().session == self.sessions[client.name], "it would be refused"
                self.clients[client.name] = client
                self.closed.discard(client.name)
                self.post(client.name, Connected(client.name))

        answer.add_done_callback(welcomed)
        self._arrival[client.name] = max(self.clock.now, self._arrival.get(client.name, 0.0)) + seconds
        self.post(client.name, event)
        return answer

    def take_bytes(self) -> tuple[int, int]:
        return 0, 0


def run_config(**sections: Any) -> RunConfig:
    """Two windows of 8 tokens to a micro-batch, two in flight; `sections` are laid over it."""
    tree: dict[str, Any] = {
        "run": {"windows": 2, "save_every": 1000},
        "data": {"sequence_length": 8},
        "window": {"tokens_per_micro_batch": 8, "micro_batches_in_flight": 2},
        "clients": {"expected": 3, "local": 0, "silence_timeout": 300.0},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    return parse_config(tree, "test")


def seats(clients: list[FakeClient]) -> dict[str, Seat]:
    return {client.name: Seat(0, f"session of {client.name}", sum(client.lengths)) for client in clients}


def contract(config: RunConfig) -> Contract:
    """Hidden states as wide as activations, and the tensors of `FakeClient`."""
    most = config.window.tokens_per_micro_batch
    return Contract(
        TensorContract(config.wire.activations, WIDTH, most),
        TensorContract(config.wire.gradients, WIDTH, most),
        config.data.sequence_length,
        config.cut == "rows",
        HALF,
        HALF,
    )


EXPECTATION = Expectation("vocabulary", "shape", '"embeddings"')


def hello_of(client: str, **changes: Any) -> pb.Hello:
    """What a client says that fits the run."""
    fields = {"protocol": PROTOCOL, "client": client, "shard_characters": 1000, "task": "masked_lm"}
    return pb.Hello(**(fields | changes))


def invitation(config: RunConfig, *endpoints: str) -> Invitation:
    return Invitation(config, endpoints or ("here:1",), b"tokenizer", "{}")


class Served:
    """A rank's rooms and its window loop around a fake engine; events are decoded on the spot.

    Rank 0 takes joins with `reception`.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Any,
        endpoint: Any,
        rank_group: Any,
        places: Mapping[str, Seat],
        stop: StopFlag | None = None,
    ) -> None:
        held_to = contract(config)

        def take_event(timeout: float) -> DecodedEvent | None:
            event = endpoint.next_event(timeout)
            return None if event is None else decoded(event, held_to)

        zeros = {name: torch.zeros(shape) for name, shape in HALF.items()}
        strategy = strategy_of_run(config)
        self.aggregator = Aggregator(zeros, strategy, config.optimizer, config.run.windows)
        self.members = Members(places, strategy.sampler(config.run.seed, dict.fromkeys(places, 0)))
        self.reception: Reception | None = None
        if rank_group.rank == 0:
            self.reception = Reception(
                replace(EXPECTATION, clients_save=strategy.halves_are_personal),
                invitation(config, *["here:1"] * rank_group.world_size), self.members,
                dict.fromkeys(places, 1000), strategy,
            )  # fmt: skip
        hear = no_joins_here if self.reception is None else self.reception.hear
        never = stop or SimpleNamespace(requested=False)
        self.sessions = Sessions(endpoint)
        self.sessions.admit({client: places[client].session for client in self.members.at(rank_group.rank)})
        self.rooms = build_rooms(
            Ground(
                config, held_to, engine, endpoint, self.aggregator, take_event, self.sessions, rank_group,
                self.members, 0, hear, never, Trace(None),
            )
        )  # fmt: skip
        fixed = config.window.micro_batches_in_flight
        limits = None if fixed == "auto" else InFlightLimits(fixed, fixed)
        newcomers = Newcomers(
            self.reception, self.members, self.rooms.membership, self.rooms.outbox, self.sessions.admit, rank_group
        )
        self.evaluations = Evaluations(self.rooms, config.run)
        self.server = RankServer(
            self.rooms, config.run, config.clients, config.optimizer, limits, 0, newcomers,
            evaluations=self.evaluations,
        )  # fmt: skip
        self._temporary = tempfile.TemporaryDirectory()
        path = Path(self._temporary.name)
        self.folder: Any = SimpleNamespace(
            path=path,
            client_model=CheckpointFolder(path).client_model,
            draft=CheckpointFolder(path),
            make_room=lambda estimate: None,
            mark_complete=lambda window, layout: None,
            layout=lambda window: Layout(rank_group.world_size, engine.zero_stage),
        )
        self.checkpoints = Checkpoints(self.rooms, self.folder)
        self.rolled_back: list[int] = []
        """Windows that were undone, as the run's log hears of it."""

    def connect(self) -> None:
        """Take every client's stream, and tell it where to begin."""
        self.server.connect()

    def train(self, statuses: list[RankStatus]) -> int:
        """From the first connection to the end; the window it stopped before."""
        self.connect()
        return self.server.train(lambda window, told: statuses.extend(told), self.checkpoints, self.rolled_back.append)


class Rank:
    """A rank with everything around it faked."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        config: RunConfig,
        clients: list[FakeClient],
        *,
        latency: Latency = lambda client, event: 0.0,
        seconds_of_work: float = 0.0,
        lockstep_forwards: bool = False,
        device_work: Callable[[Encoded, float], DeviceWork] = DeviceWork,
    ) -> None:
        self.clock = Clock()
        for module in (
            "server.evaluations",
            "server.rank",
            "server.client_service",
            "server.newcomers",
            "telemetry.time_account",
        ):
            monkeypatch.setattr(f"fedbert_ds.{module}.time", SimpleNamespace(monotonic=self.clock.monotonic))
        for module in ("federation.aggregator", "federation.update_exchange", "server.network.outbox"):
            monkeypatch.setattr(f"fedbert_ds.{module}.ThreadPoolExecutor", InlineThread)
        self.clients = clients
        self.engine = FakeEngine(self.clock, seconds_of_work, lockstep_forwards, device_work)
        self.endpoint = FakeEndpoint(self.clock, clients, latency)
        self.stop = SimpleNamespace(requested=False)
        self.statuses: list[RankStatus] = []
        self.served = Served(config, self.engine, self.endpoint, FakeRankGroup(), seats(clients), self.stop)
        self.server = self.served.server

    def run(self) -> int:
        """Train to the end; the window it stopped before."""
        return self.served.train(self.statuses)

    def collect(self, window: int) -> dict[str, Tensor]:
        """The client model for the merged checkpoint."""
        return collect_client_model(self.served.rooms, window)

    @property
    def problems(self) -> list[str]:
        return [problem for status in self.statuses for problem in status.new_problems]


def joined(hello: pb.Hello) -> tuple[JoinAsked, Future[pb.Welcome]]:
    answer: Future[pb.Welcome] = Future()
    return JoinAsked(hello, answer), answer
