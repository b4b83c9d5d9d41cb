"""A federation on a discrete-event clock: real queues; clients, links and bodies as times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from fedbert_ds.client.window_state import WindowState
from fedbert_ds.planner.clock import Clock, Cores, Pipe
from fedbert_ds.planner.scenario import ClientCosts, Scenario
from fedbert_ds.server.queue.deadlines import AnswerTimes, Deadlines
from fedbert_ds.server.queue.decisions import Backward, Decision, Expire, Forward, Open, Plan, Step, Suspend
from fedbert_ds.server.queue.in_flight import (
    INITIAL_IN_FLIGHT,
    MOST_IN_FLIGHT,
    Demand,
    InFlightLimits,
    in_flight_limits,
)
from fedbert_ds.server.queue.packing import Piece, pack
from fedbert_ds.server.queue.pipeline_queue import PipelineQueue
from fedbert_ds.server.queue.roster import next_window_of
from fedbert_ds.server.queue.seats import assign_clients
from fedbert_ds.wire.messages import Manifest

SMALL = 200
"""Bytes of a message without a tensor."""


@dataclass
class WindowResult:
    """One window, from the previous window's step to its own."""

    seconds: float
    tokens: int
    busy_seconds: float
    """Mean over ranks, without dummies."""
    dummy_micro_batches: int
    forwards: int
    in_flight: int
    """The limit it ran with."""
    wanted_in_flight: int = 0
    """What would hide the clients' round trips, whatever memory holds."""
    launching_seconds: float = 0.0
    """Mean over ranks: the device waited for the host to launch."""


@dataclass
class Outcome:
    """Figures of a simulation, its first windows left out."""

    windows: list[WindowResult]
    client_busy_share: float
    """Share of its time that the busiest client computes."""
    link_busy_share: float
    """Share of its time that the busiest client's link carries bytes, in its busier direction."""
    coordinator_seconds: float
    """CPU seconds a window of all queues' own code; measured, not simulated."""
    server_busy_share: float = 0.0
    """Share of its time that the busiest rank's network carries bytes, in its busier direction."""
    events: int = 0
    """Events on the clock, of all windows; the same on every machine."""

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return sum(w.tokens for w in self.windows) / sum(w.seconds for w in self.windows)

    @property
    def busy_share(self) -> float:
        """Share of their time that the bodies compute."""
        return sum(w.busy_seconds for w in self.windows) / sum(w.seconds for w in self.windows)

    @property
    def launching_share(self) -> float:
        """Share of their time that bodies wait for the host to launch what they compute."""
        return sum(w.launching_seconds for w in self.windows) / sum(w.seconds for w in self.windows)

    @property
    def dummy_share(self) -> float:
        """Dummies among the forwards."""
        return sum(w.dummy_micro_batches for w in self.windows) / sum(w.forwards for w in self.windows)


def simulate(scenario: Scenario, windows: int = 10, settling: int = 3) -> Outcome:
    """Run `windows` windows; the outcome leaves out the first `settling`."""
    return _Simulation(scenario, windows).run(settling)


class _Client:
    """A client: `client.trainer`'s protocol, with times in place of tensors."""

    def __init__(self, name: str, costs: ClientCosts, tokens: int, rank: _Rank, simulation: _Simulation) -> None:
        self.name, self.costs, self.rank = name, costs, rank
        self._simulation, self._clock = simulation, simulation.clock
        self._scenario = simulation.scenario
        length = self._scenario.sequence_tokens
        whole, rest = divmod(tokens, length)
        self.lengths = (length,) * whole + ((rest,) if rest or not whole else ())
        self.cpu = Pipe()
        self.up, self.down = Pipe(), Pipe()
        self._windows: WindowState[None, Piece] = WindowState(self._scenario.strategy, self._scenario.staleness)

    def receive(self, num_bytes: float, what: Callable[[], None]) -> None:
        """The server sends a message now; `what` happens when it is here."""
        left = self.rank.network_down.take(self._clock.now, num_bytes / self._scenario.server_bytes_per_second)
        self._clock.at(self.down.take(left, num_bytes / self.costs.down) + self.costs.rtt / 2, what)

    def _send(self, when: float, num_bytes: float, what: Callable[[], None]) -> None:
        arrived = self.up.take(when, num_bytes / self.costs.up) + self.costs.rtt / 2
        # Messages take the server's network in the order of their arrival there.
        self._clock.at(arrived, partial(self.rank.take_in, num_bytes, what))

    def _compute(self, seconds: float) -> float:
        seconds += self.costs.per_message
        self.cpu.busy += seconds
        if self._simulation.cores is not None:
            started = max(self._clock.now, self.cpu.free_at)
            self.cpu.free_at = self._simulation.cores.take(started, seconds)
            return self.cpu.free_at
        self.cpu.busy -= seconds
        return self.cpu.take(self._clock.now, seconds)

    def begin(self) -> None:
        """Send the first manifest."""
        first = next_window_of(self.name, self._simulation.sampler.takes_part, 0, self._simulation.num_windows)
        self.announce(first)
        self._windows.miss(0, first)

    def announce(self, window: int) -> None:
        """Send the manifest of a window."""
        if window >= self._simulation.num_windows:
            return
        self._windows.announce(window, None)
        manifest = Manifest(self.name, window, self.lengths, tuple(length * 3 // 20 for length in self.lengths))
        self._send(self._clock.now, SMALL, lambda: self.rank.queue_call(self.rank.queue.manifest, manifest))

    def plan(self, window: int, pieces: dict[int, Piece], next_window: int) -> None:
        self._windows.plan(window, pieces)
        self.announce(next_window)
        self._windows.miss(window + 1, next_window)
        self._send_activations()

    def open(self, window: int, micro_batch: int) -> None:
        self._windows.open(window, micro_batch)
        self._send_activations()

    def _send_activations(self) -> None:
        for window, micro_batch in self._windows.take_sendable():
            tokens = self._windows.piece(window, micro_batch).tokens
            done = self._compute(self.costs.embed_per_token * tokens)
            report = partial(self.rank.queue_call, self.rank.queue.answer, self.name, micro_batch, "activations")
            self._send(done, self._scenario.wire.activations * tokens + SMALL, report)

    def head(self, window: int, micro_batch: int) -> None:
        tokens = self._windows.piece(window, micro_batch).tokens
        done = self._compute(self.costs.head_per_token * tokens)
        report = partial(self.rank.queue_call, self.rank.queue.answer, self.name, micro_batch, "gradient")
        self._send(done, self._scenario.wire.gradient * tokens + SMALL, report)

    def input_gradient(self, window: int, micro_batch: int) -> None:
        tokens = self._windows.piece(window, micro_batch).tokens
        done = self._compute(self.costs.embed_per_token * tokens)
        if self._windows.finish(window, micro_batch):
            self._clock.at(done, partial(self._trained, window))

    def _trained(self, window: int) -> None:
        if not self._scenario.exchanges(window):
            self.apply(window)
            return
        deliver = partial(self._simulation.update_arrived, window, self)
        self._send(self._clock.now, self._scenario.wire.update, deliver)

    def apply(self, window: int) -> None:
        """The client half has taken this window's step."""
        self._windows.apply(window)
        self._send_activations()


class _Rank:
    """A rank: `server.rank`'s loop, with times in place of the body."""

    def __init__(self, simulation: _Simulation) -> None:
        scenario = simulation.scenario
        self._simulation, self._scenario, self._clock = simulation, scenario, simulation.clock
        fixed = scenario.micro_batches_in_flight
        self.in_flight = INITIAL_IN_FLIGHT if fixed == "auto" else fixed
        # Every client answers in the end, so no deadline suspends one, however slow it is.
        self.answer_times = AnswerTimes(floor=math.inf)
        self.queue = PipelineQueue(
            self.in_flight,
            partial(pack, capacity=scenario.tokens_per_micro_batch, clients_together=scenario.clients_per_micro_batch),
            num_windows=simulation.num_windows,
            windows_ahead=max(1, scenario.staleness),
            deadlines=Deadlines(answer_times=self.answer_times),
            takes_part=simulation.sampler.takes_part,
        )
        self.clients: dict[str, _Client] = {}
        self.network_up, self.network_down = Pipe(), Pipe()
        self.is_free = True
        self.waits_to_start = True
        self.busy = self.launching = self.service = 0.0
        self.tokens = self.dummies = self.forwards = 0

    @property
    def carried(self) -> tuple[float, float]:
        """Seconds that its network has carried bytes so far, up and down."""
        return self.network_up.busy, self.network_down.busy

    def queue_call(self, call: Callable[..., object], *arguments: object) -> None:
        """Call the queue and count its CPU time."""
        started = time.process_time()
        call(*arguments)
        self._simulation.coordinator_seconds += time.process_time() - started

    def take_in(self, num_bytes: float, what: Callable[[], None]) -> None:
        """A client's message reaches the server's network."""
        seconds = num_bytes / self._scenario.server_bytes_per_second
        self._clock.at(self.network_up.take(self._clock.now, seconds), partial(self.event, what))

    def event(self, what: Callable[[], None]) -> None:
        """A message has arrived."""
        what()
        if self.is_free:
            self.go_on()

    def go_on(self) -> None:
        """Carry out decisions until one takes time, or there is none."""
        while True:
            started = time.process_time()
            decision = self.queue.decide(self._clock.now)
            self._simulation.coordinator_seconds += time.process_time() - started
            if decision is None:
                if self.waits_to_start and self.queue.schedule.is_planned:
                    self.waits_to_start = False
                    self._simulation.gather()
                return
            if not self._carry_out(decision):
                return

    def _carry_out(self, decision: Decision) -> bool:
        """True if the rank is still free."""
        match decision:
            case Plan(window, micro_batches, manifests, _):
                pieces: dict[str, dict[int, Piece]] = {manifest.client: {} for manifest in manifests}
                for micro_batch in micro_batches:
                    for piece in micro_batch.pieces:
                        pieces[piece.client][micro_batch.index] = piece
                for name, own in pieces.items():
                    client = self.clients[name]
                    client.receive(SMALL, partial(client.plan, window, own, self.queue.roster.next_window_of(name)))
                return True
            case Open(window, micro_batch, opened):
                for piece in opened:
                    client = self.clients[piece.client]
                    client.receive(SMALL, partial(client.open, window, micro_batch))
                return True
            case Forward(micro_batch, pieces_):
                self._work(self._scenario.body.forward_per_token, pieces_, partial(self._forwarded, decision))
                return False
            case Backward(micro_batch, pieces_):
                self._work(self._scenario.body.backward_per_token, pieces_, partial(self._backwarded, decision))
                return False
            case Step():
                self.is_free = False
                self._simulation.step(self)
                return False
            case Suspend() | Expire():
                raise RuntimeError(f"{decision} has no place in a simulation")

    def _work(self, per_token: float, pieces: tuple[Piece, ...], then: Callable[[], None]) -> None:
        tokens = sum(piece.tokens for piece in pieces)
        seconds = per_token * tokens
        self.is_free = False
        # A forward and a backward take about as long to launch.
        waits = max(0.0, self._scenario.body.launch / 2 - seconds)
        self.busy += seconds
        self.launching += waits
        self._clock.at(self._clock.now + seconds + waits + self._scenario.body.per_micro_batch / 2, then)

    def _forwarded(self, forward: Forward) -> None:
        window = self._simulation.window
        self.forwards += 1
        self.dummies += not forward.pieces
        for piece in forward.pieces:
            self.tokens += piece.tokens
            client = self.clients[piece.client]
            num_bytes = self._scenario.wire.hidden * piece.tokens + SMALL
            client.receive(num_bytes, partial(client.head, window, forward.micro_batch))
        self.is_free = True
        self.go_on()

    def _backwarded(self, backward: Backward) -> None:
        window = self._simulation.window
        for piece in backward.pieces:
            client = self.clients[piece.client]
            num_bytes = self._scenario.wire.input_gradient * piece.tokens + SMALL
            client.receive(num_bytes, partial(client.input_gradient, window, backward.micro_batch))
        self.is_free = True
        self.go_on()

    def demand(self) -> Demand:
        return Demand(
            activations_seconds=self.answer_times.farthest("activations"),
            gradient_seconds=self.answer_times.farthest("gradient"),
            service_seconds=self.service,
            affordable=self._scenario.affordable_in_flight,
        )


class _Simulation:
    """The clock, the ranks and their clients, and what ranks do together."""

    def __init__(self, scenario: Scenario, windows: int) -> None:
        self.scenario = scenario
        self.num_windows = windows
        self.clock = Clock()
        self.window = 0
        self.coordinator_seconds = 0.0
        self._wanted_in_flight = 0
        self.cores = Cores(scenario.client_cores) if scenario.client_cores else None
        names = [f"client-{number:05d}" for number in range(len(scenario.clients))]
        # Any seed: a plan is for no run in particular.
        self.sampler = scenario.strategy.sampler(0, dict.fromkeys(names, 0))
        self.ranks = [_Rank(self) for _ in range(scenario.num_ranks)]
        self._gathered = self._stepped = 0
        self._updates: dict[int, list[_Client]] = {}
        self._results: list[WindowResult] = []
        self._started_at = 0.0
        share = max(1, scenario.tokens_per_window // scenario.num_participants)
        seats = assign_clients(dict.fromkeys(names, share), scenario.num_ranks)
        self.clients = []
        for name, costs in zip(names, scenario.clients, strict=True):
            rank = self.ranks[seats[name]]
            client = rank.clients[name] = _Client(name, costs, share, rank, self)
            rank.queue_call(rank.queue.join, name, 0.0)
            self.clients.append(client)

    def run(self, settling: int) -> Outcome:
        """All windows; figures of those after the first `settling`."""
        for client in self.clients:
            client.begin()
        for rank in self.ranks:
            rank.go_on()
        busy_before: list[tuple[float, float, float]] = []
        carried_before = [(0.0, 0.0)] * len(self.ranks)
        settled_at = 0.0
        while len(self._results) < self.num_windows:
            if not self.clock.advance():
                raise RuntimeError(f"nothing more can happen in window {self.window}")
            if len(self._results) == settling and not busy_before:
                settled_at = self.clock.now
                busy_before = [(c.cpu.busy, c.up.busy, c.down.busy) for c in self.clients]
                carried_before = [rank.carried for rank in self.ranks]
                self.coordinator_seconds = 0.0
        elapsed = self.clock.now - settled_at
        pairs = list(zip(self.clients, busy_before, strict=True))
        return Outcome(
            windows=self._results[settling:],
            client_busy_share=max(client.cpu.busy - cpu for client, (cpu, _, _) in pairs) / elapsed,
            link_busy_share=max(max(c.up.busy - up, c.down.busy - down) for c, (_, up, down) in pairs) / elapsed,
            coordinator_seconds=self.coordinator_seconds / (self.num_windows - settling),
            server_busy_share=max(
                max(now - then for now, then in zip(rank.carried, before, strict=True))
                for rank, before in zip(self.ranks, carried_before, strict=True)
            )
            / elapsed,
            events=self.clock.events,
        )

    def gather(self) -> None:
        """A rank is ready for the next window, which starts when all ranks are."""
        self._gathered += 1
        if self._gathered == len(self.ranks):
            self._gathered = 0
            self.clock.at(self.clock.now + self.scenario.body.gather, self._start)

    def _start(self) -> None:
        if self.scenario.micro_batches_in_flight == "auto":
            demands = [rank.demand() for rank in self.ranks]
            limits = in_flight_limits(demands)
            boundless = [replace(demand, affordable=MOST_IN_FLIGHT) for demand in demands]
            self._wanted_in_flight = in_flight_limits(boundless).in_flight
        else:
            limits = InFlightLimits(self.scenario.micro_batches_in_flight, self.scenario.micro_batches_in_flight)
            self._wanted_in_flight = limits.in_flight
        most = max(1, *(rank.queue.schedule.num_micro_batches for rank in self.ranks))
        for rank in self.ranks:
            rank.in_flight = limits.in_flight
            rank.busy = rank.launching = 0.0
            rank.tokens = rank.dummies = rank.forwards = 0
            rank.queue_call(rank.queue.start, most, self.clock.now, limits)
        if self.scenario.exchanges(self.window):
            self._updates[self.window] = []
        for rank in self.ranks:
            rank.go_on()

    def step(self, rank: _Rank) -> None:
        """A rank is through with its micro-batches; the optimizer steps when all ranks are."""
        self._stepped += 1
        if self._stepped == len(self.ranks):
            self._stepped = 0
            self.clock.at(self.clock.now + self.scenario.body.step, self._after_step)

    def _after_step(self) -> None:
        for rank in self.ranks:
            if real := rank.forwards - rank.dummies:
                rank.service = (rank.busy + rank.launching) / real
            rank.busy += self.scenario.body.step
        self._results.append(
            WindowResult(
                seconds=self.clock.now - self._started_at,
                tokens=sum(rank.tokens for rank in self.ranks),
                busy_seconds=sum(rank.busy for rank in self.ranks) / len(self.ranks),
                dummy_micro_batches=sum(rank.dummies for rank in self.ranks),
                forwards=sum(rank.forwards for rank in self.ranks),
                in_flight=self.ranks[0].in_flight,
                wanted_in_flight=self._wanted_in_flight,
                launching_seconds=sum(rank.launching for rank in self.ranks) / len(self.ranks),
            )
        )
        self._started_at = self.clock.now
        self.window += 1
        for rank in self.ranks:
            rank.is_free = True
            rank.waits_to_start = self.window < self.num_windows
        for rank in self.ranks:
            rank.go_on()

    def update_arrived(self, window: int, client: _Client) -> None:
        """A participant's update is here; after the last one all clients get it combined."""
        self._updates[window].append(client)
        count = self.scenario.num_participants
        if len(self._updates[window]) == count:
            size = self.scenario.wire.update
            combined = self.clock.now + size * self.scenario.combine_per_byte * count / len(self.ranks)
            senders = {sender.name: sender for sender in self._updates.pop(window)}
            for receiver in [*senders.values(), *(other for other in self.clients if other.name not in senders)]:
                # `receive` reads the clock, so it is called when the combined update is there.
                self.clock.at(combined, partial(receiver.receive, size, partial(receiver.apply, window)))
