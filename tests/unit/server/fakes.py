"""What surrounds a rank, without DeepSpeed, processes or network: engine, control, clients, an ingress, a clock."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedbert_ds.config import RunConfig, parse_config
from fedbert_ds.federation.strategy import exchange_after
from fedbert_ds.server.admission import Seat
from fedbert_ds.server.body.device_work import DeviceWork
from fedbert_ds.server.body.engine import BodyInput
from fedbert_ds.server.contract import Report
from fedbert_ds.server.inbox import Shapes
from fedbert_ds.server.network.endpoint import Connected, Disconnected, Event, JoinAsked, Received
from fedbert_ds.server.rank import RankServer
from fedbert_ds.telemetry.trace import Trace
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import decode, encode, encode_positions, encode_row_index
from fedbert_ds.wire.messages import HalfAssembler, half_chunks

WIDTH = 4
HALF = {"table": (3, WIDTH), "head": (2,)}
Alter = Callable[[int, pb.ClientMessage], list[pb.ClientMessage]]
"""(number of this message, message) -> what is sent instead."""


class FakeEngine:
    """A body that doubles what it is given, and counts: easy to tell from any other function."""

    def __init__(
        self,
        clock: Clock | None = None,
        seconds: float = 0.0,
        lockstep_forwards: bool = False,
        device_work: Callable[[Tensor, float], DeviceWork] = DeviceWork,
    ) -> None:
        self.lockstep_forwards = lockstep_forwards
        self.steps: list[float] = []
        self.saved: list[int] = []
        self.backwards: list[tuple[int, bool]] = []
        self.tokens = 0
        self._clock, self._seconds = clock, seconds
        self._device_work = device_work
        self._inputs: dict[int, BodyInput] = {}

    def forward(self, micro_batch: int, body_input: BodyInput) -> DeviceWork:
        self._work()
        assert micro_batch not in self._inputs
        self._inputs[micro_batch] = body_input
        bounds = body_input.cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds == sorted(set(bounds)), "every sequence has tokens"
        per_token = self._per_token(body_input, body_input.activations)
        assert len(per_token) == bounds[-1]
        self.tokens += len(per_token)
        return self._device_work(2.0 * per_token[body_input.masked_positions], self._seconds)

    def backward(self, micro_batch: int, hidden_gradient: Tensor, is_last: bool) -> DeviceWork:
        self._work()
        body_input = self._inputs.pop(micro_batch)
        assert hidden_gradient.shape == (len(body_input.masked_positions), WIDTH)
        self.backwards.append((micro_batch, is_last))
        leaf = body_input.activations.clone().requires_grad_()
        hidden = 2.0 * self._per_token(body_input, leaf)[body_input.masked_positions]
        hidden.backward(hidden_gradient)
        return self._device_work(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, self._seconds)

    def step(self, learning_rate: float) -> None:
        assert not self._inputs, "a step inside a window"
        self.steps.append(learning_rate)

    def dummy_input(self, width: int, with_rows: bool, seed: int) -> BodyInput:
        index = torch.zeros(1, dtype=torch.int64) if with_rows else None
        nowhere = torch.zeros(0, dtype=torch.int64)
        return BodyInput(torch.zeros(1, width), nowhere, torch.tensor([0, 1], dtype=torch.int32), index, seed)

    def save(self, folder: Path, window: int) -> None:
        self.saved.append(window)

    def affordable_depth(self) -> int:
        return 8

    def _per_token(self, body_input: BodyInput, values: Tensor) -> Tensor:
        return values if body_input.row_index is None else values[body_input.row_index]

    def _work(self) -> None:
        if self._clock is not None:
            self._clock.now += self._seconds


class FakeControl:
    """The only rank."""

    rank, world_size, group, half_group = 0, 1, None, None

    def gather(self, mine: Any) -> list[Any]:
        return [mine]

    def complete_checkpoint(self, folder: Path, window: int) -> None:
        pass


class FakeClient:
    """An honest client of the protocol: `handle` answers a server message, but for what `alter` makes of the answer.

    Sequences, activations and gradients follow from its name and the window alone. It checks that hidden states and
    input gradients are what `FakeEngine` makes of its own numbers, whoever shares its micro-batches.
    """

    def __init__(
        self,
        name: str,
        config: RunConfig,
        lengths: tuple[int, ...] = (3, 5, 2, 4),
        alter: Alter = lambda number, message: [message],
    ) -> None:
        self.name = name
        self.lengths = lengths
        self.windows_stepped: list[int] = []
        """Windows whose step its half has taken, in order."""
        self.passed_over: list[int] = []
        self.skipped: list[int] = []
        self.halves: list[dict[str, Tensor]] = []
        self.hidden_states = 0
        self.finish: pb.Finish | None = None
        self.refusal: str | None = None
        self._config = config
        self._alter = alter
        self._sent = itertools.count()
        self._ready_for = 0
        """The first window whose step, exchange included, its half has not taken."""
        self._window_of: dict[int, int] = {}
        self._pieces: dict[int, pb.Piece] = {}
        self._unfinished: dict[int, set[int]] = {}
        self._opened: list[int] = []
        self._gradients: dict[int, Tensor] = {}
        self._assembler = HalfAssembler(HALF, "the server's half")

    def manifest(self, window: int) -> list[pb.ClientMessage]:
        if window >= self._config.run.windows:
            return []
        masked = [length // 2 for length in self.lengths]
        return [pb.ClientMessage(manifest=pb.Manifest(window=window, lengths=self.lengths, masked=masked))]

    def handle(self, message: pb.ServerMessage) -> list[pb.ClientMessage]:
        answers: list[pb.ClientMessage] = []
        match message.WhichOneof("body"):
            case "plan":
                answers += self._plan(message.plan)
            case "open":
                self._opened.append(message.open.micro_batch)
                answers += self._activations_due()
            case "hidden":
                answers.append(self._gradient(message.hidden))
            case "input_gradient":
                self._check_input_gradient(message.input_gradient)
                answers += self._finish_pieces(message.input_gradient.window, [message.input_gradient.micro_batch])
            case "skipped":
                self.skipped.append(message.skipped.window)
                answers += self._finish_pieces(message.skipped.window, message.skipped.micro_batches)
            case "half":
                if (complete := self._assembler.add(message.half)) is not None:
                    answers += self._take_half(message.half.window, complete[0])
            case "save":
                answers.append(pb.ClientMessage(saved=pb.Saved(window=message.save.window, flops_per_token=7.0)))
            case "half_request":
                answers += self._half(message.half_request.window, weight=1.0)
            case "finish":
                self.finish = message.finish
            case "refused":
                self.refusal = message.refused.reason
        return [altered for answer in answers for altered in self._alter(next(self._sent), answer)]

    def numbers(self, micro_batch: int, what: str, count: int) -> Tensor:
        random = torch.Generator().manual_seed(hash((self.name, micro_batch, what)) % 2**31)
        return torch.randn(count, WIDTH, generator=random)

    def own_half(self) -> dict[str, Tensor]:
        return {name: torch.full(shape, float(len(self.name))) for name, shape in HALF.items()}

    def _plan(self, plan: pb.Plan) -> list[pb.ClientMessage]:
        for piece in plan.pieces:
            self._pieces[piece.micro_batch] = piece
            self._window_of[piece.micro_batch] = plan.window
        self._unfinished[plan.window] = {piece.micro_batch for piece in plan.pieces}
        answers = self.manifest(plan.next_window)
        if not plan.pieces:
            self.passed_over += range(plan.window, plan.next_window)
            if self._config.federation.mode == "parallel":
                self._ready_for = max(self._ready_for, plan.next_window)
        return answers + self._activations_due()

    def _activations_due(self) -> list[pb.ClientMessage]:
        """What was asked for and its half is ready for."""
        horizon = self._ready_for + self._config.window.staleness
        due = [number for number in self._opened if self._window_of[number] <= horizon]
        self._opened = [number for number in self._opened if number not in due]
        return [self._activations(number) for number in due]

    def _finish_pieces(self, window: int, micro_batches: Iterable[int]) -> list[pb.ClientMessage]:
        self._opened = [number for number in self._opened if number not in micro_batches]
        unfinished = self._unfinished[window]
        unfinished -= set(micro_batches)
        if unfinished:
            return []
        if self._config.federation.mode == "synchronous":
            return self._half(window, weight=1.0)
        self.windows_stepped.append(window)
        if exchange_after(self._config.federation, window) == "weights":
            return self._half(window, weight=float(len(self.name)))
        self._ready_for = max(self._ready_for, window + 1)
        return self._activations_due()

    def _take_half(self, window: int, half: dict[str, Tensor]) -> list[pb.ClientMessage]:
        self._assembler = HalfAssembler(HALF, "the server's half")
        self.halves.append(half)
        if len(self.halves) == 1:
            return self.manifest(0)
        if self._config.federation.mode == "synchronous":
            self.windows_stepped.append(window)
        self._ready_for = max(self._ready_for, window + 1)
        return self._activations_due()

    def _lengths(self, micro_batch: int) -> tuple[int, ...]:
        piece = self._pieces[micro_batch]
        return self.lengths[piece.first_sequence : piece.first_sequence + piece.num_sequences]

    def _positions(self, micro_batch: int) -> Tensor:
        """The last half of each sequence is masked."""
        positions, first = [], 0
        for length in self._lengths(micro_batch):
            positions += range(first + length - length // 2, first + length)
            first += length
        return torch.tensor(positions, dtype=torch.int64)

    def _per_token(self, micro_batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values as sent, the same for each token, and the row index of cut: rows (every other word is the same)."""
        tokens = sum(self._lengths(micro_batch))
        if self._config.cut != "rows":
            values = self.numbers(micro_batch, "activations", tokens)
            return values, values, None
        index = torch.tensor([0 if token % 2 else token // 2 for token in range(tokens)])
        rows = self.numbers(micro_batch, "rows", int(index.max()) + 1)
        return rows, rows[index], index

    def _activations(self, micro_batch: int) -> pb.ClientMessage:
        values, _, index = self._per_token(micro_batch)
        message = pb.Activations(
            window=self._window_of[micro_batch],
            micro_batch=micro_batch,
            values=encode(values, self._config.wire.activations),
            masked_positions=encode_positions(self._positions(micro_batch), sum(self._lengths(micro_batch))),
        )
        if index is not None:
            message.row_index = encode_row_index(index, len(values))
        return pb.ClientMessage(activations=message)

    def _gradient(self, message: pb.Hidden) -> pb.ClientMessage:
        number, positions = message.micro_batch, self._positions(message.micro_batch)
        hidden = decode(message.values, (len(positions), WIDTH), self._config.wire.hidden_states, "hidden states")
        _, per_token, _ = self._per_token(number)
        assert torch.equal(hidden, 2.0 * per_token[positions]), f"{self.name}: hidden states of micro-batch {number}"
        self.hidden_states += len(hidden)
        gradient = self._gradients[number] = self.numbers(number, "gradient", len(positions))
        frame = encode(gradient, self._config.wire.gradients)
        return pb.ClientMessage(
            gradient=pb.Gradient(window=message.window, micro_batch=number, hidden=frame, loss_sum=2.0 * len(positions))
        )

    def _check_input_gradient(self, message: pb.InputGradient) -> None:
        number, positions = message.micro_batch, self._positions(message.micro_batch)
        values, _, index = self._per_token(number)
        expected = torch.zeros_like(values)
        where = positions if index is None else index[positions]
        expected.index_add_(0, where, 2.0 * self._gradients.pop(number))
        got = decode(message.values, values.shape, self._config.wire.gradients, "input gradient")
        torch.testing.assert_close(got, expected)

    def _half(self, window: int, weight: float) -> list[pb.ClientMessage]:
        return [pb.ClientMessage(half=chunk) for chunk in half_chunks(window, self.own_half().items(), weight)]


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


class FakeIngress:
    """An ingress whose clients answer at once, or `latency` seconds later; a wait moves the clock."""

    def __init__(self, clock: Clock, clients: list[FakeClient], latency: Latency) -> None:
        self.clock = clock
        self.clients = {client.name: client for client in clients}
        self.sent: list[tuple[str, pb.ServerMessage]] = []
        self.closed: set[str] = set()
        self.revoked: set[str] = set()
        self._latency = latency
        self._arrival: dict[str, float] = {}
        self._count = itertools.count()
        self._events: list[tuple[float, int, Event]] = []
        for client in clients:
            self.post(client.name, Connected(client.name))

    def post(self, client: str, event: Event) -> None:
        """An event of a client, after those it has sent before."""
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
                return
            self.post(client, Received(client, answer))

    def close(self, client: str, last: pb.ServerMessage) -> None:
        self.send(client, last)
        self.closed.add(client)

    def revoke(self, client: str) -> None:
        self.revoked.add(client)

    def take_bytes(self) -> tuple[int, int]:
        return 0, 0


GONE = pb.ClientMessage()
"""Sent by an `Alter`, it stands for a connection that breaks."""


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


def shapes(config: RunConfig) -> Shapes:
    return Shapes(WIDTH, WIDTH, config.data.sequence_length, config.cut == "rows", HALF, frozenset(HALF))


class Rank:
    """A RankServer with everything around it faked."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        config: RunConfig,
        clients: list[FakeClient],
        *,
        latency: Latency = lambda client, event: 0.0,
        seconds_of_work: float = 0.0,
        lockstep_forwards: bool = False,
        device_work: Callable[[Tensor, float], DeviceWork] = DeviceWork,
    ) -> None:
        self.clock = Clock()
        for module in ("server.rank", "federation.update_exchange"):
            monkeypatch.setattr(f"fedbert_ds.{module}.time", SimpleNamespace(monotonic=self.clock.monotonic))
        for module in ("federation.update_exchange", "server.network.outbox"):
            monkeypatch.setattr(f"fedbert_ds.{module}.ThreadPoolExecutor", InlineThread)
        self.clients = clients
        self.engine = FakeEngine(self.clock, seconds_of_work, lockstep_forwards, device_work)
        self.ingress = FakeIngress(self.clock, clients, latency)
        self.stop = SimpleNamespace(requested=False)
        self.reports: list[Report] = []
        self.server = RankServer(
            config,
            shapes(config),
            self.engine,  # type: ignore[arg-type]
            self.ingress,  # type: ignore[arg-type]
            FakeControl(),  # type: ignore[arg-type]
            seats(clients),
            0,
            self.stop,
            Trace(None),
        )

    def run(self) -> int:
        """Train to the end; the window it stopped before."""
        self.server.connect({name: torch.zeros(shape) for name, shape in HALF.items()}, lambda: None)
        return self.server.train(lambda window, reports, seconds: self.reports.extend(reports), Path("checkpoints"))

    @property
    def problems(self) -> list[str]:
        return [problem for report in self.reports for problem in report.new_problems]


def joined(hello: pb.Hello) -> tuple[JoinAsked, Future[pb.Welcome]]:
    answer: Future[pb.Welcome] = Future()
    return JoinAsked(hello, answer), answer
