"""A rank's life: agree on the run, build the body, let clients in, train, hand the result over."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fedbert_ds.config import RunConfig
from fedbert_ds.data.tokenizer import num_rows, vocabulary_hash
from fedbert_ds.errors import INTERRUPTED, RunError, warn
from fedbert_ds.federation.aggregator import Aggregator
from fedbert_ds.federation.server_optimizer import rule_of
from fedbert_ds.federation.strategy import strategy_of_run
from fedbert_ds.folder_lock import keep_private, locked
from fedbert_ds.model.checkpoint import config_to_json, shape_hash
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.server.addresses import nearest
from fedbert_ds.server.admission import (
    Expectation,
    Invitation,
    Joins,
    Members,
    Start,
    answer_visitor,
    fill,
    start_of,
)
from fedbert_ds.server.checkpoint import Checkpoints
from fedbert_ds.server.contract import Contract
from fedbert_ds.server.elsewhere import Elsewhere
from fedbert_ds.server.evaluations import Evaluations
from fedbert_ds.server.hand_over import best_model_keeper, hand_over
from fedbert_ds.server.heartbeat import Heartbeat
from fedbert_ds.server.here import Here, listen
from fedbert_ds.server.knocks import Knocks
from fedbert_ds.server.local_clients import LocalClients
from fedbert_ds.server.network.decoding import Decoding
from fedbert_ds.server.network.limits import most_kept
from fedbert_ds.server.network.sessions import Sessions
from fedbert_ds.server.newcomers import Newcomers, Reception, no_joins_here
from fedbert_ds.server.queue.in_flight import InFlightLimits
from fedbert_ds.server.queue.seats import capped
from fedbert_ds.server.rank import RankServer
from fedbert_ds.server.rank_group import RankGroup
from fedbert_ds.server.rank_messages import RankSecret
from fedbert_ds.server.rooms import Ground, Rooms, build_rooms
from fedbert_ds.server.run_contract import build_contract, most_window_bytes
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.server.run_model import RunModel, build_model_of_run
from fedbert_ds.server.run_reporter import RunReporter
from fedbert_ds.server.stop_signal import StopSignal
from fedbert_ds.tasks.registry import task_of
from fedbert_ds.telemetry.evaluations import Evaluation
from fedbert_ds.wire import address_file
from fedbert_ds.wire.messages import cut_to_json


def serve(config: RunConfig, resume: bool) -> int:
    """Run this rank to the end and return its exit code. torch.distributed must be initialized.

    Raises a UserError on the rank that it concerns; the launcher then ends the others.
    """
    ranks, folder = RankGroup(RankSecret(config.run.directory)), RunFolder(config.run.directory)
    keep_private()
    heart = Heartbeat(ranks.rank, ranks.world_size)
    heart.start()
    is_complete = _run(config, resume, ranks, folder)
    heart.stop()
    # Rank 0 speaks for the run. Launchers take any other code of any rank for a crash.
    if ranks.rank != 0:
        return 0
    if not is_complete:
        return INTERRUPTED
    address_file.close(folder.address)
    return 0


def _run(config: RunConfig, resume: bool, ranks: RankGroup, folder: RunFolder) -> bool:
    """Train and hand over; returns whether the run is complete."""
    stop = StopSignal()
    with ExitStack() as at_end:  # callbacks run in reverse order
        here = listen(config, ranks, folder, at_end)
        if ranks.rank == 0:
            at_end.enter_context(locked(folder.path, "run.directory"))
        model, half = build_model_of_run(config, resume, ranks, folder)
        seated = _let_in(config, resume, ranks, folder, here, model, stop, at_end)
        contract = build_contract(config, half)
        aggregator = seated.elsewhere or _aggregator(config, half)
        del half  # the aggregator has its own copy
        rooms, reception = _furnish(config, ranks, here, model, seated, contract, aggregator, stop, at_end)
        start = seated.start
        if ranks.rank == 0:
            folder.checkpoints.begin_at(start.first_window)
        checkpoints = Checkpoints(rooms, folder.checkpoints)
        if start.is_saved:
            checkpoints.load(start.first_window)
        admit_elsewhere = _admission_elsewhere(config, rooms)
        admit_elsewhere({client: start.seats[client].aggregator_session for client in rooms.members.at(ranks.rank)})
        # A client may come as soon as it is welcomed, so every rank must be ready for it.
        ranks.barrier()
        if ranks.rank == 0:
            for client, seat in start.seats.items():
                seated.joins.welcome(client, seated.invitation.to(client, seat))
        evaluations = _evaluations(config, ranks, folder, model, rooms, start.first_window)
        rank = RankServer(
            rooms,
            config.run,
            config.clients,
            config.optimizer,
            _fixed_limits(config),
            start.first_window,
            Newcomers(
                reception,
                rooms.members,
                rooms.membership,
                rooms.outbox,
                seated.sessions.admit,
                ranks,
                admit_elsewhere,
            ),
            here.clients.check
            if config.clients.on_loss == "continue" and seated.elsewhere is None
            else here.clients.revive,
            evaluations,
        )
        rank.connect()
        with model.reporter.following(start.first_window) if ranks.rank == 0 else nullcontext():
            window = _train(rank, model.reporter, checkpoints, rooms, here.clients)
        is_complete = window == config.run.windows or evaluations.is_exhausted
        _hand_over(config, folder, here, model, rooms, checkpoints, window, is_complete)
        return is_complete


@dataclass(frozen=True)
class _Seated:
    """Who takes part from the start, and what later ones are asked and told."""

    start: Start
    joins: Joins
    expectation: Expectation
    invitation: Invitation
    elsewhere: Elsewhere | None
    """The line to another party's aggregator."""
    sessions: Sessions
    """Of the clients of this rank."""


def _let_in(
    config: RunConfig,
    resume: bool,
    ranks: RankGroup,
    folder: RunFolder,
    here: Here,
    model: RunModel,
    stop: StopSignal,
    at_end: ExitStack,
) -> _Seated:
    """Wait for the clients that the run expects; nobody is welcomed yet."""
    run, tokenizer = model.prepared.run, model.tokenizer
    saved = None
    if resume:
        saved = ranks.broadcast(_whole_windows(folder) if ranks.rank == 0 else None, frozenset[int])
    expectation = _expectation(config, saved, tokenizer, model.config, run)
    elsewhere, expectation = _open_elsewhere(config, ranks, resume, tokenizer, expectation, at_end)
    joins = Joins(config.clients.expected, expectation)
    near = dict.fromkeys(here.tokens, nearest(here.addresses, here.local_addresses, here.nodes))
    invitation = Invitation(config, here.addresses, model.prepared.tokenizer, config_to_json(model.config), run, near)
    if ranks.rank == 0:
        at_end.callback(address_file.hide, folder.address)
        address_file.reveal(folder.address, here.addresses[0])
        model.reporter.announce(here.addresses[0], here.cores)
        here.clients.start(here.local_addresses[0], list(here.tokens))
        visitors = partial(answer_visitor, invitation)
        fill(joins, here.endpoint.next_event, config.clients.join_timeout, stop, here.clients.check, visitors)
    start = ranks.broadcast(_start(config, joins, ranks.world_size) if ranks.rank == 0 else None, Start)
    return _Seated(start, joins, expectation, invitation, elsewhere, Sessions(here.endpoint))


def _furnish(
    config: RunConfig,
    ranks: RankGroup,
    here: Here,
    model: RunModel,
    seated: _Seated,
    contract: Contract,
    aggregator: Aggregator | Elsewhere,
    stop: StopSignal,
    at_end: ExitStack,
) -> tuple[Rooms, Reception | None]:
    """This rank's rooms, open for the clients that have a seat; on rank 0 who receives others."""
    strategy = strategy_of_run(config)
    start, endpoint = seated.start, here.endpoint
    endpoint.keep_at_most(most_kept(contract.exchanged, most_window_bytes(config, strategy, contract)))
    decoding = Decoding(endpoint.next_event, contract, here.codec_threads, pinned=torch.cuda.is_available())
    members = Members(start.seats, strategy.sampler(config.run.seed, dict.fromkeys(start.seats, 0)))
    reception = None
    if ranks.rank == 0:
        reception = Reception(seated.expectation, seated.invitation, members, seated.joins.shard_sizes, strategy)
    knocks = Knocks(ranks.rank, ranks.world_size)
    rooms = build_rooms(
        Ground(
            config=config,
            contract=contract,
            engine=model.engine,
            endpoint=endpoint,
            aggregator=aggregator,
            take_event=knocks.among(decoding.next_event, lambda: reception.waiting if reception is not None else ()),
            sessions=seated.sessions,
            rank_group=ranks,
            members=members,
            first_window=start.first_window,
            on_join=reception.hear if reception is not None else no_joins_here,
            stop=stop,
            trace=here.trace,
            codec_threads=here.codec_threads,
        )
    )
    at_end.callback(decoding.stop)
    at_end.callback(knocks.stop)
    at_end.callback(rooms.service.settle)
    seated.sessions.admit({client: start.seats[client].session for client in members.at(ranks.rank)})
    decoding.start()
    knocks.start()
    return rooms, reception


def _evaluations(
    config: RunConfig, ranks: RankGroup, folder: RunFolder, model: RunModel, rooms: Rooms, first_window: int
) -> Evaluations:
    """Those of earlier sessions, to go on with."""
    task = task_of(model.config)
    earlier = ranks.broadcast(
        model.reporter.begin_at(first_window) if ranks.rank == 0 else None, tuple[Evaluation, ...]
    )
    return Evaluations(
        rooms,
        config.run,
        earlier,
        model.reporter.evaluated,
        best_model_keeper(rooms, folder, model.config, model.tokenizer) if config.run.keep_best else None,
        task.measures if task is not None else None,
    )


def _hand_over(
    config: RunConfig,
    folder: RunFolder,
    here: Here,
    model: RunModel,
    rooms: Rooms,
    checkpoints: Checkpoints,
    window: int,
    is_complete: bool,
) -> None:
    """Let clients end, and write what the run leaves."""
    ranks = rooms.rank_group
    if ranks.rank == 0:
        # Clients end in the hand-over. A restarted one must not find this address.
        address_file.hide(folder.address)
    # Without a body no collective keeps another rank from ending its clients before that.
    ranks.barrier()
    hand_over(
        rooms,
        config,
        window,
        is_complete,
        list(checkpoints.client_figures.values()),
        model.config,
        model.tokenizer,
        model.reporter.facts(),
        model.reporter.evaluations,
    )
    here.clients.wait(seconds=30)
    # A launcher ends all ranks when the first one leaves with an exit code, and rank 0 is still
    # writing.
    ranks.barrier()


def _start(config: RunConfig, joins: Joins, world_size: int) -> Start:
    strategy = strategy_of_run(config)
    participants = strategy.num_participants(config.clients.expected)
    if config.window.share == "data":
        for client, times in capped(joins.shard_sizes, config.window.largest_share).items():
            warn(
                f"client {client} has {times:,.1f} times the median client's text, of which "
                f"{config.window.largest_share:g} times count; raise window.largest_share if more should"
            )
    return start_of(joins, world_size, config.window, participants)


def _aggregator(config: RunConfig, half: ClientHalf) -> Aggregator:
    strategy = strategy_of_run(config)
    initial = {name: parameter.detach() for name, parameter in half.named_parameters()}
    return Aggregator(initial, strategy, config.optimizer, config.run.windows, rule_of(config.federation))


def _whole_windows(folder: RunFolder) -> frozenset[int]:
    """Windows that the run may go on with."""
    return folder.checkpoints.whole_windows(warn)


def _expectation(
    config: RunConfig, saved: frozenset[int] | None, tokenizer: Any, model_config: Any, run: str
) -> Expectation:
    clients_save = strategy_of_run(config).halves_are_personal
    hashes = vocabulary_hash(tokenizer), shape_hash(model_config)
    return Expectation(*hashes, cut_to_json(config.cut), saved, clients_save, run, config.task.name)


def _open_elsewhere(
    config: RunConfig, ranks: RankGroup, resume: bool, tokenizer: Any, expectation: Expectation, at_end: ExitStack
) -> tuple[Elsewhere | None, Expectation]:
    """The aggregator of another party, if there is one; what has been saved there, too, is
    expected.
    """
    if config.aggregator is None:
        return None, expectation
    elsewhere = Elsewhere(config, ranks, num_rows(tokenizer), tokenizer.pad_token_id, expectation.shape_hash)
    at_end.callback(elsewhere.stop)
    saved = elsewhere.open(resume)
    if expectation.saved_windows is not None:
        expectation = replace(expectation, saved_windows=expectation.saved_windows & saved)
    return elsewhere, expectation


def _admission_elsewhere(config: RunConfig, rooms: Rooms) -> Callable[[dict[str, str]], None]:
    """Admits clients of this rank to the aggregator of another party, by their sessions there."""
    if rooms.remote is None:
        return lambda _: None
    return partial(rooms.remote.admit, timeout=config.clients.join_timeout)


def _fixed_limits(config: RunConfig) -> InFlightLimits | None:
    fixed = config.window.micro_batches_in_flight
    return None if fixed == "auto" else InFlightLimits(fixed, fixed)


def _train(
    rank: RankServer, reporter: RunReporter, checkpoints: Checkpoints, rooms: Rooms, clients: LocalClients
) -> int:
    try:
        return rank.train(reporter.window, checkpoints, reporter.roll_back, reporter.waits)
    except RunError as error:
        rooms.service.finish(f"the run ended: {error}", complete=False)
        if rooms.remote is not None and rooms.rank_group.rank == 0:
            rooms.remote.finish(f"the run ended: {error}", complete=False)
        reasons = "; ".join(clients.failures(patience=15.0))
        raise RunError(f"{reasons}; {error}" if reasons and reasons not in str(error) else str(error)) from error
