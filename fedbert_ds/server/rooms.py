"""The rooms of one rank, wired together. Only this file knows which room needs which."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from fedbert_ds.config import RunConfig
from fedbert_ds.federation.aggregator import Aggregator
from fedbert_ds.federation.averaging import NobodyDelivered
from fedbert_ds.federation.client_update import ClientUpdate
from fedbert_ds.federation.combining import Combiner
from fedbert_ds.federation.strategy import Strategy, strategy_of_run
from fedbert_ds.federation.update_exchange import UpdateExchange
from fedbert_ds.server.admission import Members
from fedbert_ds.server.among_ranks import AmongRanks
from fedbert_ds.server.body.engine import BodyEngine
from fedbert_ds.server.body.health import BodyHealth
from fedbert_ds.server.client_service import ClientService
from fedbert_ds.server.contract import Arrived, Contract
from fedbert_ds.server.cursors import Cursors
from fedbert_ds.server.inbox import Inbox
from fedbert_ds.server.influence import Influence
from fedbert_ds.server.masked_counts import MaskedCounts
from fedbert_ds.server.membership import Membership
from fedbert_ds.server.micro_batches import MicroBatches
from fedbert_ds.server.network.events import JoinAbandoned, JoinAsked, RankEndpoint
from fedbert_ds.server.network.outbox import Outbox
from fedbert_ds.server.network.sessions import Sessions, TakeEvent
from fedbert_ds.server.queue.deadlines import AnswerTimes, Deadlines
from fedbert_ds.server.queue.in_flight import INITIAL_IN_FLIGHT
from fedbert_ds.server.queue.packing import pack
from fedbert_ds.server.queue.pipeline_queue import Pack, PipelineQueue
from fedbert_ds.server.rank_group import RankGroup
from fedbert_ds.server.remote_aggregator import Line, RemoteAggregator
from fedbert_ds.server.remote_exchange import RemoteExchange
from fedbert_ds.server.stop_signal import StopFlag
from fedbert_ds.telemetry.time_account import TimeAccount
from fedbert_ds.telemetry.trace import Trace
from fedbert_ds.wire.messages import Manifest
from fedbert_kernels.encoded import Encoded

T = TypeVar("T")


@dataclass(frozen=True)
class Rooms:
    """The rooms that a rank's window loop, checkpoints and hand-over use."""

    contract: Contract
    strategy: Strategy
    staleness: int
    """Windows that a client may begin before earlier updates are combined."""
    members: Members
    engine: BodyEngine
    rank_group: RankGroup
    stop: StopFlag
    trace: Trace
    queue: PipelineQueue
    exchange: UpdateExchange | RemoteExchange
    remote: RemoteAggregator | None
    """The aggregator of another party, if there is one."""
    aggregator: Aggregator | None
    """This rank's own, if there is none."""
    combiner: Combiner | None
    """As `aggregator`."""
    cursors: Cursors
    masked_counts: MaskedCounts
    influence: Influence
    inbox: Inbox
    outbox: Outbox
    membership: Membership
    service: ClientService
    health: BodyHealth
    micro_batches: MicroBatches
    time: TimeAccount

    @property
    def lost_elsewhere(self) -> str:
        """Why the aggregator of another party is gone, if it is."""
        return self.remote.lost if self.remote is not None else ""

    def gathered(self, mine: T, kind: Any) -> list[T]:
        """One value of this type of every rank, in order of ranks. Waits for all of them."""
        with self.time.charged("ranks"):
            return self.rank_group.gather(mine, kind)

    def take_activations(self, micro_batch: int, client: str) -> Arrived:
        """The activations of a client's piece, as they may count."""
        arrived = self.inbox.take_activations(micro_batch, client)
        return replace(arrived, values=self.influence.activations(client, arrived.values))

    def take_gradient(self, micro_batch: int, client: str) -> Encoded:
        """d(loss)/d(hidden) of a client's piece, as it may count."""
        return self.influence.gradient(client, self.inbox.take_gradient(micro_batch, client))

    def commit_elsewhere(self, window: int, scale: float) -> None:
        """Tell an aggregator of another party that the body has stepped; rank 0 does, for all."""
        has_update = self.strategy.exchange_after(window) != "nothing"
        if self.remote is not None and self.rank_group.rank == 0 and has_update:
            self.remote.commit(window, scale)


@dataclass(frozen=True)
class Ground:
    """What a rank's rooms are built on."""

    config: RunConfig
    contract: Contract
    engine: BodyEngine
    endpoint: RankEndpoint
    aggregator: Aggregator | Line
    """This rank's own, or the line to another party's."""
    take_event: TakeEvent
    """Returns the endpoint's next event, decoded, whether it counts or not."""
    sessions: Sessions
    """Of the clients of this rank at the endpoint."""
    rank_group: RankGroup
    members: Members
    first_window: int
    on_join: Callable[[JoinAsked | JoinAbandoned], None]
    stop: StopFlag
    trace: Trace
    codec_threads: int = 1
    """Compress messages."""

    @property
    def strategy(self) -> Strategy:
        """As the run file has it."""
        return strategy_of_run(self.config)

    @property
    def waits(self) -> bool:
        """Whether the run waits for lost clients."""
        return self.config.clients.on_loss == "wait"


def build_rooms(ground: Ground) -> Rooms:
    """Build the rooms of this rank, for the clients among the members that have a seat here."""
    config, contract, engine, endpoint = ground.config, ground.contract, ground.engine, ground.endpoint
    members, strategy = ground.members, ground.strategy
    queue = _queue(config, strategy, engine.lockstep_forwards, members, ground.first_window)
    cursors = Cursors({})
    updates = _updates(ground, queue)
    influence = Influence(config.federation.bound, contract.first_sizes, lambda *bounded: membership.bounded(*bounded))
    inbox = Inbox(queue, updates.exchange, cursors, contract, members.tokens, influence)
    outbox = Outbox(endpoint, ground.codec_threads)
    membership = Membership(queue, updates.exchange, inbox, cursors, outbox, updates.revoke, ground.waits)
    account = TimeAccount()
    health = BodyHealth(engine, contract.activations.width, contract.is_rows_cut)
    service = ClientService(
        queue,
        inbox,
        updates.exchange,
        membership,
        cursors,
        outbox,
        ground.sessions.heard(ground.take_event),
        ground.on_join,
        ground.members.has_state,
        ground.trace,
        updates.owner,
        contract.update_codec,
        config.wire.is_compressed,
        account,
        health,
        holds_updates=strategy.clips_together and (ground.waits or config.optimizer.gradient_clipping > 0),
        shares_moments=not strategy.halves_are_personal,
        is_stopping=lambda: ground.stop.requested,
    )
    return Rooms(
        contract=contract,
        strategy=strategy,
        staleness=config.federation.staleness,
        members=members,
        engine=engine,
        rank_group=ground.rank_group,
        stop=ground.stop,
        trace=ground.trace,
        queue=queue,
        exchange=updates.exchange,
        remote=updates.owner if isinstance(updates.owner, RemoteAggregator) else None,
        aggregator=updates.owner if isinstance(updates.owner, Aggregator) else None,
        combiner=updates.combiner,
        cursors=cursors,
        masked_counts=MaskedCounts(),
        influence=influence,
        inbox=inbox,
        outbox=outbox,
        membership=membership,
        service=service,
        health=health,
        time=account,
        micro_batches=MicroBatches(
            engine, contract, config.wire, outbox, ground.trace, config.run.seed, ground.rank_group.rank, health.unsound
        ),
    )


@dataclass(frozen=True)
class _Updates:
    """Where client updates go: to this rank's own aggregator, or to another party's."""

    owner: Aggregator | RemoteAggregator
    exchange: UpdateExchange | RemoteExchange
    combiner: Combiner | None
    revoke: Callable[[str], None]
    """Parts with a client."""


def _updates(ground: Ground, queue: PipelineQueue) -> _Updates:
    revoke = ground.sessions.revoke
    if isinstance(ground.aggregator, Aggregator):
        combiner = _combiner(ground.config, ground.contract, ground.aggregator, ground.rank_group)
        return _Updates(ground.aggregator, _exchange(combiner, ground.aggregator), combiner, revoke)
    remote = RemoteAggregator(ground.aggregator, ground.first_window)
    return _Updates(remote, RemoteExchange(remote, queue.deadlines), None, _both(revoke, remote.part_with))


def _combiner(config: RunConfig, contract: Contract, aggregator: Aggregator, rank_group: RankGroup) -> Combiner:
    shapes = {name: contract.exchanged[name] for name in sorted(contract.exchanged)}
    return Combiner(config.federation, shapes, AmongRanks(rank_group), aggregator.common)


def _exchange(combiner: Combiner, aggregator: Aggregator) -> UpdateExchange:
    """The exchange of updates among the ranks."""

    def combined(updates: Mapping[str, ClientUpdate], average: bool) -> dict[str, Tensor]:
        try:
            result = combiner.combine(updates, average)
        except NobodyDelivered:
            return aggregator.unchanged(combiner.shapes)
        return aggregator.answer(result) if average else result

    return UpdateExchange(combined, combiner.take_bounded)


def _both(first: Callable[[str], None], second: Callable[[str], None]) -> Callable[[str], None]:
    def both(client: str) -> None:
        first(client)
        second(client)

    return both


def _queue(
    config: RunConfig, strategy: Strategy, lockstep_forwards: bool, members: Members, first_window: int
) -> PipelineQueue:
    window = config.window
    fixed = window.micro_batches_in_flight
    # Under `order: fixed` nothing may depend on the clock, and a run that waits leaves nobody out.
    leaves_out = window.order != "fixed" and config.clients.on_loss == "continue"
    answer_times = AnswerTimes() if leaves_out else None
    packing: Pack = partial(
        pack, capacity=window.tokens_per_micro_batch, clients_together=window.clients_per_micro_batch
    )
    return PipelineQueue(
        INITIAL_IN_FLIGHT if fixed == "auto" else fixed,
        _no_micro_batches if strategy.trains_alone else packing,
        window.order,
        lockstep_forwards,
        first_window,
        config.run.windows,
        windows_ahead=max(1, config.federation.staleness),
        deadlines=Deadlines(config.clients.silence_timeout, answer_times),
        takes_part=members.sampler.takes_part,
    )


def _no_micro_batches(manifests: Sequence[Manifest]) -> tuple[()]:
    """Clients that hold the whole model send no activations."""
    return ()
