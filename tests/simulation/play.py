"""One schedule, played: real rooms of every rank, clients and faults, in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from simulation import arithmetic
from simulation.body import Body, BodyState
from simulation.client import HALF, Machine
from simulation.draw import Fault, Schedule
from simulation.link import Stream
from simulation.ranks import Board, Endpoint, Group, InlineThread, ThreadBeside, Updates
from simulation.world import Task, World

from fedbert_ds.config import RunConfig
from fedbert_ds.errors import RunError
from fedbert_ds.federation.aggregator import Aggregator
from fedbert_ds.federation.reference import Reference
from fedbert_ds.federation.strategy import strategy_of_run
from fedbert_ds.server.admission import Expectation, Joins, Members, Seat, Start, fill, start_of
from fedbert_ds.server.checkpoint import Books, Checkpoints
from fedbert_ds.server.checkpoint_folder import Layout
from fedbert_ds.server.contract import Contract, RankStatus, TensorContract
from fedbert_ds.server.hand_over import collect_client_model
from fedbert_ds.server.network.events import JoinAbandoned, JoinAsked
from fedbert_ds.server.network.sessions import Sessions
from fedbert_ds.server.newcomers import Newcomers, Reception, no_joins_here
from fedbert_ds.server.queue.in_flight import InFlightLimits
from fedbert_ds.server.rank import RankServer
from fedbert_ds.server.rooms import Ground, Rooms, build_rooms
from fedbert_ds.telemetry.trace import Trace
from fedbert_ds.wire import fedbert_pb2 as pb

POLL_SECONDS = 2.0
"""In place of the ranks' own: fewer looks at the clock."""
CLOCKS = ("server.rank", "server.client_service", "server.newcomers", "server.admission", "server.evaluations")
TIMED = (*CLOCKS, "telemetry.time_account")
THREADS = ("federation.aggregator", "server.network.outbox")
POLLS = ("server.rank", "server.client_service", "server.admission")


class _Current:
    """The play under way: what patched names of the product refer to."""

    play: Play


CURRENT = _Current()


@contextmanager
def simulated() -> Iterator[None]:
    """Inside, the product's clocks are virtual, its threads are the world's and its files toys."""
    clock = SimpleNamespace(monotonic=lambda: CURRENT.play.world.now)
    with ExitStack() as patches:
        for module in TIMED:
            patches.enter_context(mock.patch(f"fedbert_ds.{module}.time", clock))
        for module in THREADS:
            patches.enter_context(mock.patch(f"fedbert_ds.{module}.ThreadPoolExecutor", InlineThread))
        for module in POLLS:
            patches.enter_context(mock.patch(f"fedbert_ds.{module}.POLL_SECONDS", POLL_SECONDS))
        patched: dict[str, Any] = {
            "server.client_service.COMBINING_POLL_SECONDS": 0.3,
            "federation.update_exchange.ThreadPoolExecutor": lambda *_, **__: CURRENT.play.thread_beside(),
            "server.rooms.AmongRanks": Updates,
            "server.inbox.decode_positions": lambda payload, *_: payload,
            "server.checkpoint.write_client_model": lambda *told: CURRENT.play.disk.write(*told),
            "server.checkpoint.read_client_model": lambda window, _: CURRENT.play.disk.read(window),
        }
        for name, value in patched.items():
            patches.enter_context(mock.patch(f"fedbert_ds.{name}", value))
        yield


@dataclass
class Disk:
    """The checkpoints of a run; those without a mark do not count."""

    bodies: dict[tuple[int, int], BodyState] = field(default_factory=dict)
    client_models: dict[int, tuple[Reference, Books]] = field(default_factory=dict)
    complete: dict[int, Layout] = field(default_factory=dict)
    path = Path("nowhere")

    @property
    def draft(self) -> Disk:
        return self

    def of(self, window: int) -> Path:
        return self.path / f"window-{window}"

    def client_model(self, window: int) -> int:
        return window

    def make_room(self, estimate: int) -> None:
        return None

    def layout(self, window: int) -> Layout:
        return self.complete[window]

    def mark_complete(self, window: int, layout: Layout) -> None:
        assert window in self.client_models and all((window, rank) in self.bodies for rank in range(layout.ranks))
        self.complete[window] = layout
        for old in sorted(self.complete)[:-2]:
            del self.complete[old]

    def write(self, window: int, reference: Reference, books: Books) -> None:
        weights = {name: tensor.clone() for name, tensor in reference.weights.items()}
        self.client_models[window] = Reference(reference.version, weights, dict(reference.optimizer)), deepcopy(books)

    def read(self, window: int) -> tuple[Reference, Books]:
        return self.client_models[window]

    def begin_at(self, window: int) -> None:
        """Checkpoints of later windows are of a past that is undone."""
        for later in [saved for saved in self.complete if saved > window]:
            del self.complete[later]


@dataclass
class Ended:
    """What a rank had at its end."""

    window: int
    rooms: Rooms
    body: Body
    aggregator: Aggregator
    client_model: float
    """As handed over."""


class _Invitation:
    """Stands for an `Invitation`, whose settings take long to write."""

    def __init__(self, config: RunConfig, ranks: int) -> None:
        self.config = config
        self.endpoints = [str(rank) for rank in range(ranks)]

    def to(self, client: str, seat: Seat) -> pb.Welcome:
        return pb.Welcome(endpoint=str(seat.rank), session=seat.session, settings=str(seat.tokens))


class Coordinator:
    """The ranks of one start of the run, until they end or are killed."""

    def __init__(self, play: Play, num_ranks: int) -> None:
        self.play = play
        self.num_ranks = num_ranks
        self.stop = SimpleNamespace(requested=False)
        self.board = Board(play.world, num_ranks)
        self.is_dead = False
        self.ended: dict[int, Ended] = {}
        self.members: Members | None = None
        self._endpoints: dict[int, Endpoint] = {}
        self._tasks: list[Task] = []
        self._streams: list[Stream] = []

    def start(self) -> None:
        """Start every rank."""
        for rank in range(self.num_ranks):
            self._tasks.append(self.play.world.start(f"rank {rank}", lambda task, rank=rank: self._run(rank, task)))

    def die(self) -> None:
        """Every rank is killed, as by a launcher that lost one."""
        if self.is_dead:
            return
        self.is_dead = True
        for task in self._tasks:
            self.play.world.kill(task)
        for stream in self._streams:
            stream.die()
        self.play.coordinator_is_gone()

    def join(self, event: JoinAsked | JoinAbandoned) -> None:
        """A client calls Join at rank 0."""
        if 0 not in self._endpoints:
            return
        self._endpoints[0].join(event)
        if isinstance(event, JoinAsked):
            for endpoint in self._endpoints.values():
                knock = partial(endpoint.knock, event.hello.client)
                self.play.world.after(self.play.world.random.random(), knock)

    def open(
        self, client: str, rank: int, session: str, seed: int,
        on_message: Callable[[pb.ServerMessage], None], on_lost: Callable[[], None],
    ) -> Stream | None:  # fmt: skip
        """A client opens its stream; None if the rank does not let it."""
        schedule = self.play.schedule
        endpoint = self._endpoints[rank]
        stream = Stream(
            self.play.world, client, session, seed, schedule.latency, self.play.config.clients.reconnect_timeout,
            endpoint, on_message, on_lost,
        )  # fmt: skip
        if not endpoint.open(stream):
            return None
        self._streams.append(stream)
        return stream

    def streams_of(self, client: str) -> list[Stream]:
        """Those that a client has at any rank."""
        return [endpoint.streams[client] for endpoint in self._endpoints.values() if client in endpoint.streams]

    # -- a rank ------------------------------------------------------------------------------------

    def _run(self, rank: int, task: Task) -> None:
        try:
            self._serve(rank, task)
        except RunError as error:
            # A launcher starts the ranks again.
            self.play.told.append(str(error))
            self.play.world.after(0.0, self.die)

    def _serve(self, rank: int, task: Task) -> None:
        """As `serve` does, from the first gathering to the hand-over."""
        play, config = self.play, self.play.config
        world, strategy = play.world, play.strategy
        group = Group(self.board, rank, task, lambda: play.work(self))
        endpoint = self._endpoints[rank] = Endpoint(world, group)
        group.barrier()
        saved = group.broadcast(play.whole_windows() if rank == 0 else None, None)
        expectation = Expectation("", "", '"embeddings"', saved, strategy.halves_are_personal, "run")
        joins = Joins(config.clients.expected, expectation)
        if rank == 0:
            fill(joins, endpoint.next_event, config.clients.join_timeout, self.stop, lambda: None, lambda _: False)
        told = None
        if rank == 0:
            participants = strategy.num_participants(config.clients.expected)
            told = start_of(joins, self.num_ranks, config.window, participants)
        start: Start = group.broadcast(told, None)
        members = Members(start.seats, strategy.sampler(config.run.seed, dict.fromkeys(start.seats, 0)))
        invitation = _Invitation(config, self.num_ranks)
        reception = None
        if rank == 0:
            self.members = members
            reception = Reception(expectation, invitation, members, joins.shard_sizes, strategy)  # type: ignore[arg-type]
        aggregator = Aggregator({HALF: torch.zeros(1)}, strategy, config.optimizer, config.run.windows)
        half = None
        if strategy.clips_together:
            half = lambda: float(aggregator.reference().weights[HALF][0])  # noqa: E731
        body = Body(group, play.schedule.lockstep_forwards, play.disk.bodies, play.batches, half)
        play.building = self.board, rank
        hear = reception.hear if reception is not None else no_joins_here
        sessions = Sessions(endpoint)  # type: ignore[arg-type]
        ground = Ground(
            config, play.contract, body, endpoint, aggregator, endpoint.next_event, sessions,  # type: ignore[arg-type]
            group, members, start.first_window, hear, self.stop, Trace(None),
        )  # fmt: skip
        rooms = build_rooms(ground)
        body.outbox = rooms.outbox
        rooms = replace(rooms, micro_batches=body)  # type: ignore[arg-type]
        sessions.admit({client: start.seats[client].session for client in members.at(rank)})
        if rank == 0:
            play.disk.begin_at(start.first_window)
            play.begin_at(start.first_window)
        checkpoints = Checkpoints(rooms, play.disk)  # type: ignore[arg-type]
        if start.is_saved:
            checkpoints.load(start.first_window)
        group.barrier()
        if rank == 0:
            for client, seat in start.seats.items():
                joins.welcome(client, invitation.to(client, seat))
        fixed = config.window.micro_batches_in_flight
        limits = None if fixed == "auto" else InFlightLimits(fixed, fixed)
        newcomers = Newcomers(reception, members, rooms.membership, rooms.outbox, sessions.admit, group)  # type: ignore[arg-type]
        server = RankServer(
            rooms, config.run, config.clients, config.optimizer, limits, start.first_window, newcomers
        )  # fmt: skip
        server.connect()
        window = server.train(
            play.on_window if rank == 0 else lambda *_: None, checkpoints,
            play.on_roll_back if rank == 0 else lambda *_: None,
        )  # fmt: skip
        group.barrier()
        client_model = float(collect_client_model(rooms, window)[HALF][0])
        self.ended[rank] = Ended(window, rooms, body, aggregator, client_model)
        rooms.service.finish("the end", complete=window == config.run.windows)
        group.barrier()
        if rank == 0:
            world.after(0.0, lambda: play.ended(self))


class Play:
    """One schedule on its way."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.config = schedule, schedule.config
        self.strategy = strategy_of_run(self.config)
        self.world = World(schedule.seed)
        self.disk = Disk()
        self.coordinator: Coordinator | None = None
        self.last: Coordinator | None = None
        """The one that came to the end."""
        self.log: list[tuple[int, Any]] = []
        """What rank 0 reported of each window that counts: the tallies of all ranks."""
        self.told: list[str] = []
        """Problems, as ranks told them."""
        self.building = Board(self.world, 1), 0
        """The rank whose rooms are being built."""
        self.num_starts = self.num_roll_backs = 0
        self.damaged: set[int] = set()
        self.batches: dict[tuple[str, int], range] = {}
        """The places of each client's sequences in a window, as it last announced them."""
        self.is_anew = False
        """A client has lost what only it had, and began with the reference."""
        self.machines = {
            name: Machine(self, name, schedule.seed * 31 + number) for number, name in enumerate(schedule.clients)
        }
        self.contract = Contract(
            TensorContract("fp32", 1, 1 << 20), TensorContract("fp32", 1, 1 << 20), arithmetic.LONGEST, False,
            {HALF: (1,)}, {HALF: (1,)},
        )  # fmt: skip
        self._work = 0
        self._faults_by_work = {fault.work: fault for fault in schedule.faults if fault.work is not None}

    def run(self) -> None:
        """Play it to the end; raises whatever went wrong."""
        CURRENT.play = self
        self._start_coordinator()
        for name in self.schedule.clients[: self.schedule.num_first]:
            self.soon(self.machines[name].start)
        for name in self.schedule.clients[self.schedule.num_first :]:
            self.world.after(self.schedule.newcomers_after, self.machines[name].start)
        for fault in self.schedule.faults:
            if fault.work is None:
                self.world.after(fault.seconds, lambda fault=fault: self._happens(fault))
        self.world.run(lambda: self.last is not None)
        self.world.settle()

    # -- what patched names of the product call ----------------------------------------------------

    def thread_beside(self) -> ThreadBeside:
        return ThreadBeside(*self.building)

    # -- time --------------------------------------------------------------------------------------

    def soon(self, do: Callable[[], None]) -> None:
        """After a message's time."""
        self.world.after(self.schedule.latency * self.world.random.random(), do)

    def later(self, do: Callable[[], None]) -> None:
        """After a client's or launcher's patience."""
        self.world.after(1.0 + 2.0 * self.world.random.random(), do)

    def characters(self, client: str) -> int:
        """The size of a client's text."""
        return self.schedule.characters[client]

    # -- the ranks ---------------------------------------------------------------------------------

    def whole_windows(self) -> frozenset[int] | None:
        """The checkpoints that a resume may begin with; None for the first start."""
        return frozenset(self.disk.complete.keys() - self.damaged) if self.num_starts > 1 else None

    def work(self, coordinator: Coordinator) -> None:
        """A rank is about to do something."""
        self._work += 1
        if (fault := self._faults_by_work.pop(self._work, None)) is not None and coordinator is self.coordinator:
            self._happens(fault)

    def on_window(self, window: int, statuses: Sequence[RankStatus]) -> None:
        self.log.append((window, [status.tally for status in statuses]))
        self.told += [problem for status in statuses for problem in status.new_problems]

    def on_roll_back(self, window: int) -> None:
        self.num_roll_backs += 1
        self._forget_from(window)

    def begin_at(self, window: int) -> None:
        """The run goes on with this window; what was reported of later ones is undone."""
        self._forget_from(window)

    def _forget_from(self, window: int) -> None:
        self.log = [told for told in self.log if told[0] < window]

    def _start_coordinator(self) -> None:
        sizes = self.schedule.ranks
        self.num_starts += 1
        self.coordinator = Coordinator(self, sizes[min(self.num_starts, len(sizes)) - 1])
        self.coordinator.start()

    def coordinator_is_gone(self) -> None:
        """Ranks are started again, clients that are connected join again."""
        if self.last is not None:
            return
        self.coordinator = None
        self.later(self._start_coordinator)
        for machine in self.machines.values():
            if machine.lives and not machine.is_away and not machine.is_complete:
                life = machine.lives
                self.later(lambda machine=machine, life=life: machine.lost(life))

    def ended(self, coordinator: Coordinator) -> None:
        """All ranks came to the end."""
        if coordinator.is_dead or coordinator is not self.coordinator:
            return
        if coordinator.ended[0].window == self.config.run.windows:
            self.last = coordinator
        else:
            coordinator.is_dead = True
            self.coordinator_is_gone()

    # -- faults ------------------------------------------------------------------------------------

    def _happens(self, fault: Fault) -> None:
        if self.last is not None:
            return
        machine = self.machines.get(fault.who)
        match fault.kind:
            case "kill client" if machine is not None and machine.lives and not machine.is_complete:
                machine.kill(fault.notice, fault.keeps_state)
                # Who has never been there cannot be done without.
                machine.is_away = fault.duration is None and bool(self.log)
                if not machine.is_away:
                    life = machine.lives
                    self.world.after(fault.duration or 0.0, lambda: machine.start() if life == machine.lives else None)
            case "hang" if machine is not None:
                machine.pause(fault.duration or 0.0)
            case "cut":
                for stream in self.coordinator.streams_of(fault.who) if self.coordinator else ():
                    stream.cut(fault.duration or 0.0, fault.notice)
            case "kill ranks" if self.coordinator is not None:
                self.coordinator.die()
            case "stop" if self.coordinator is not None:
                self.coordinator.stop.requested = True
            case "damage" if len(self.disk.complete) > 1 and self.coordinator is not None:
                self.damaged = {max(self.disk.complete)}
                self.coordinator.die()
