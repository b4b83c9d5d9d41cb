"""A rank's life: agree on the run, build the body, let clients in, train, hand the result over."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fedbert_ds.config import ClientsSection, RunConfig, ServerSection
from fedbert_ds.data.tokenizer import num_rows, tokenizer_from_bytes, tokenizer_to_bytes, vocabulary_hash
from fedbert_ds.errors import INTERRUPTED, ConfigError, RunError, warn
from fedbert_ds.federation.aggregator import Aggregator
from fedbert_ds.federation.server_optimizer import rule_of
from fedbert_ds.federation.strategy import Strategy, strategy_of
from fedbert_ds.folder_lock import keep_private, locked
from fedbert_ds.model.architecture import longest_sequence
from fedbert_ds.model.body import Body
from fedbert_ds.model.checkpoint import build_model, config_to_json, shape_hash
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.model.cut import split, undivided
from fedbert_ds.server.addresses import advertised_host, listening_port, local_host, nearest, tls_of
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
from fedbert_ds.server.body.cores import Place, allowed_cores, bind, codec_threads, place_of, share_of, threads_for
from fedbert_ds.server.body.engine import BodyEngine
from fedbert_ds.server.body.no_body import NoBody
from fedbert_ds.server.body.peak import Peak, peak_of, together
from fedbert_ds.server.checkpoint import Checkpoints
from fedbert_ds.server.contract import Contract, Sizes, TensorContract
from fedbert_ds.server.elsewhere import Elsewhere
from fedbert_ds.server.evaluations import Evaluations
from fedbert_ds.server.first_sizes import first_sizes
from fedbert_ds.server.hand_over import best_model_keeper, hand_over
from fedbert_ds.server.heartbeat import Heartbeat
from fedbert_ds.server.knocks import Knocks
from fedbert_ds.server.local_clients import LocalClients, new_tokens
from fedbert_ds.server.network.decoding import Decoding
from fedbert_ds.server.network.door import DoorRules
from fedbert_ds.server.network.endpoint import Endpoint
from fedbert_ds.server.network.endpoint_process import EndpointProcess
from fedbert_ds.server.network.events import RankEndpoint
from fedbert_ds.server.network.limits import most_kept
from fedbert_ds.server.newcomers import Newcomers, Reception, no_joins_here
from fedbert_ds.server.prepare import TextFacts, is_prepared, prepare_text, prepared_text
from fedbert_ds.server.queue.in_flight import InFlightLimits
from fedbert_ds.server.queue.seats import capped
from fedbert_ds.server.rank import RankServer
from fedbert_ds.server.rank_group import RankGroup
from fedbert_ds.server.rank_messages import RankSecret
from fedbert_ds.server.rooms import Rooms, build_rooms
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.server.run_reporter import RunReporter
from fedbert_ds.server.stop_signal import StopSignal
from fedbert_ds.tasks.registry import task_of, task_of_section
from fedbert_ds.telemetry.evaluations import Evaluation
from fedbert_ds.telemetry.trace import Trace
from fedbert_ds.wire import address_file
from fedbert_ds.wire.host_port import host_port
from fedbert_ds.wire.messages import cut_to_json


@dataclass(frozen=True)
class Prepared:
    """Rank 0's preparations, which every rank needs before it builds its body."""

    tokenizer: bytes
    facts: TextFacts | None
    run: str
    """The run's id."""


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
    rule = strategy_of(config.federation, config.wire, config.cut)
    launched_on = allowed_cores()
    has_gpu = torch.cuda.is_available()
    places = ranks.gather(place_of(socket.gethostname(), torch.cuda.current_device() if has_gpu else None), Place)
    cores = _bind(share_of(ranks.rank, places)) if has_gpu else frozenset()
    threads = codec_threads(ranks.rank, places)
    devices, tls = _client_devices(config.clients.local_device), tls_of(config.server.tls)
    tokens = ranks.broadcast(new_tokens(config.clients.local) if ranks.rank == 0 else None, dict[str, str])
    clients = LocalClients(
        folder, devices, launched_on, config.task.name, tls=tls, tokens=tokens, cache=config.data.cache
    )
    endpoint = build_endpoint(config.server, config.clients, ranks.rank, tokens)
    trace = Trace(folder.trace(ranks.rank) if config.run.trace else None, ranks.rank)
    with ExitStack() as at_end:  # callbacks run in reverse order
        at_end.callback(trace.close)
        at_end.callback(clients.stop)
        at_end.callback(endpoint.stop)
        port = endpoint.start()
        host = advertised_host(config.server, ranks.world_size)
        if tls is not None:
            tls.check_host(host)
        addresses = ranks.gather(host_port(host, port), str)
        local_addresses = ranks.gather(host_port(local_host(config.server), port), str)
        if ranks.rank == 0:
            at_end.enter_context(locked(folder.path, "run.directory"))
        prepared = ranks.broadcast(_prepare(config, folder, resume) if ranks.rank == 0 else None, Prepared)
        tokenizer = tokenizer_from_bytes(prepared.tokenizer)
        model_config, half, body = _halves(config, tokenizer)
        reporter = RunReporter(config, ranks.world_size, prepared.facts, half, body)
        engine = _engine(config, body)
        if body is not None:
            reporter.peak = together(ranks.gather(peak_of(_device(), _dtype(config)), Peak))
        del body
        saved = None
        if resume:
            saved = ranks.broadcast(_whole_windows(folder) if ranks.rank == 0 else None, frozenset[int])
        expectation = _expectation(config, saved, tokenizer, model_config, prepared.run)
        elsewhere, expectation = _open_elsewhere(config, ranks, resume, tokenizer, expectation, at_end)
        joins = Joins(config.clients.expected, expectation)
        near = nearest(addresses, local_addresses, [place.node for place in places])
        invitation = Invitation(
            config,
            addresses,
            prepared.tokenizer,
            config_to_json(model_config),
            prepared.run,
            dict.fromkeys(tokens, near),
        )
        if ranks.rank == 0:
            at_end.callback(address_file.hide, folder.address)
            address_file.reveal(folder.address, addresses[0])
            reporter.announce(addresses[0], cores)
            clients.start(local_addresses[0], list(tokens))
            visitors = partial(answer_visitor, invitation)
            fill(joins, endpoint.next_event, config.clients.join_timeout, stop, clients.check, visitors)
        start = ranks.broadcast(_start(config, joins, rule, ranks.world_size) if ranks.rank == 0 else None, Start)
        contract = build_contract(config, half)
        endpoint.keep_at_most(most_kept(contract.exchanged, _most_window_bytes(config, rule, contract)))
        decoding = Decoding(endpoint.next_event, contract, threads, pinned=torch.cuda.is_available())
        aggregator = elsewhere or _aggregator(config, half, rule)
        del half  # the aggregator has its own copy
        members = Members(start.seats, rule.sampler(config.run.seed, dict.fromkeys(start.seats, 0)))
        reception = None
        if ranks.rank == 0:
            reception = Reception(expectation, invitation, members, joins.shard_sizes, rule)
        knocks = Knocks(ranks.rank, ranks.world_size)
        rooms = build_rooms(
            config,
            contract,
            engine,
            endpoint,
            aggregator,
            knocks.among(decoding.next_event, lambda: reception.waiting if reception is not None else ()),
            ranks,
            members,
            start.first_window,
            reception.hear if reception is not None else no_joins_here,
            stop,
            trace,
            threads,
        )
        at_end.callback(decoding.stop)
        at_end.callback(knocks.stop)
        at_end.callback(rooms.service.settle)
        endpoint.admit({client: start.seats[client].session for client in members.at(ranks.rank)})
        decoding.start()
        knocks.start()
        if ranks.rank == 0:
            folder.checkpoints.begin_at(start.first_window)
        checkpoints = Checkpoints(rooms, folder.checkpoints)
        if start.is_saved:
            checkpoints.load(start.first_window)
        admit_elsewhere = _admission_elsewhere(config, rooms)
        admit_elsewhere({client: start.seats[client].aggregator_session for client in members.at(ranks.rank)})
        # A client may come as soon as it is welcomed, so every rank must be ready for it.
        ranks.barrier()
        if ranks.rank == 0:
            for client, seat in start.seats.items():
                joins.welcome(client, invitation.to(client, seat))
        evaluations = Evaluations(
            rooms,
            config.run,
            ranks.broadcast(reporter.begin_at(start.first_window) if ranks.rank == 0 else None, tuple[Evaluation, ...]),
            reporter.evaluated,
            best_model_keeper(rooms, folder, model_config, tokenizer) if config.run.keep_best else None,
            task.measures if (task := task_of(model_config)) is not None else None,
        )
        rank = RankServer(
            rooms,
            config.run,
            config.clients,
            config.optimizer,
            _fixed_limits(config),
            start.first_window,
            Newcomers(reception, members, rooms.membership, endpoint.admit, ranks, admit_elsewhere),
            clients.check if config.clients.on_loss == "continue" and elsewhere is None else clients.revive,
            evaluations,
        )
        rank.connect()
        with reporter.following(start.first_window) if ranks.rank == 0 else nullcontext():
            window = _train(rank, reporter, checkpoints, rooms, clients)
        if ranks.rank == 0:
            # Clients end in the hand-over. A restarted one must not find this address.
            address_file.hide(folder.address)
        # Without a body no collective keeps another rank from ending its clients before that.
        ranks.barrier()
        figures = list(checkpoints.client_figures.values())
        is_complete = window == config.run.windows or evaluations.is_exhausted
        hand_over(
            rooms,
            config,
            window,
            is_complete,
            figures,
            model_config,
            tokenizer,
            reporter.facts(),
            reporter.evaluations,
        )
        clients.wait(seconds=30)
        # A launcher ends all ranks when the first one leaves with an exit code, and rank 0 is still
        # writing.
        ranks.barrier()
        return is_complete


def build_contract(config: RunConfig, half: ClientHalf) -> Contract:
    """The contract of this run's messages, from the run file and the client half."""
    strategy = strategy_of(config.federation, config.wire, config.cut)
    parameters = {name: tuple(parameter.shape) for name, parameter in half.named_parameters()}
    if config.aggregator is not None:
        parameters = {}  # none of them comes here
    most = max(config.window.tokens_per_micro_batch, config.data.sequence_length)
    return Contract(
        activations=TensorContract(config.wire.activations, half.widths.activations, most),
        gradients=TensorContract(config.wire.gradients, half.widths.hidden, most, is_gradient=True),
        longest_sequence=config.data.sequence_length,
        is_rows_cut=config.cut == "rows",
        exchanged={n: shape for n, shape in parameters.items() if strategy.takes_part(half.parameter_scope(n))},
        handed_over={n: shape for n, shape in parameters.items() if strategy.is_handed_over(half.parameter_scope(n))},
        update_codec=strategy.update_codec,
        num_counts=half.num_counts,
        mask_probability=1.0 if config.task.is_labelled else config.data.mask_probability,
        first_sizes=_first_sizes(config, half),
    )


def _first_sizes(config: RunConfig, half: ClientHalf) -> Sizes | None:
    if config.cut == "whole" or config.federation.bound is None:
        return None
    return first_sizes(half, config.wire.activations, config.data.sequence_length, config.run.seed)


def build_endpoint(
    server: ServerSection, clients: ClientsSection, rank: int, tokens: Mapping[str, str]
) -> RankEndpoint:
    """A rank's endpoint, not yet listening. `auto` takes a process of its own beside a GPU, and
    with TLS, where strangers may come.
    """
    # By `fedbert-ds bench network`, a process of its own pays where the body leaves cores idle.
    in_process = server.network == "process" or (
        server.network == "auto" and (torch.cuda.is_available() or server.tls is not None)
    )
    rules = DoorRules(clients.allowed, server.tls.revoked if server.tls else None, tokens)
    kind = EndpointProcess if in_process else Endpoint
    port = listening_port(server, rank)
    return kind(server.host, port, tls_of(server.tls), clients.reconnect_timeout, server.shared_memory, rules)


def _prepare(config: RunConfig, folder: RunFolder, resume: bool) -> Prepared:
    folder.write_config(config)
    # Left by a run that was killed, or that is extended now.
    address_file.hide(folder.address)
    if resume and is_prepared(folder):
        tokenizer, facts = prepared_text(folder)
    else:
        try:
            tokenizer, facts = prepare_text(config, folder)
        except BaseException:
            if not resume:
                folder.remove()
            raise
    return Prepared(tokenizer_to_bytes(tokenizer), facts, folder.identify())


def _halves(config: RunConfig, tokenizer: Any) -> tuple[Any, ClientHalf, Body | None]:
    """(transformers config, client half, body if there is one), built from the run's seed; equal on
    all ranks.
    """
    task = task_of_section(config.task)
    model = build_model(config.model, num_rows(tokenizer), tokenizer.pad_token_id, config.run.seed, task)
    if config.data.sequence_length > longest_sequence(model.config):
        raise ConfigError(
            f"data.sequence_length {config.data.sequence_length} is longer than the model's position table, "
            f"{longest_sequence(model.config)}; lower it"
        )
    if config.cut == "whole":
        return model.config, undivided(model), None
    return model.config, *split(model, config.cut)


def _engine(config: RunConfig, body: Body | None) -> BodyEngine:
    if body is None:
        return NoBody()
    device = _device()
    longest = config.data.sequence_length
    return BodyEngine.build(body.to(device), config.body, config.optimizer, config.kernels, device, longest)


def _start(config: RunConfig, joins: Joins, strategy: Strategy, world_size: int) -> Start:
    participants = strategy.num_participants(config.clients.expected)
    if config.window.share == "data":
        for client, times in capped(joins.shard_sizes, config.window.largest_share).items():
            warn(
                f"client {client} has {times:,.1f} times the median client's text, of which "
                f"{config.window.largest_share:g} times count; raise window.largest_share if more should"
            )
    return start_of(joins, world_size, config.window, participants)


def _most_window_bytes(config: RunConfig, strategy: Strategy, contract: Contract) -> float:
    """Bytes of a window's tensors to one client, if all text were its own."""
    expected = config.clients.expected
    tokens = config.window.tokens * expected / strategy.num_participants(expected)
    return 4 * tokens * (contract.activations.width + contract.gradients.width)


def _aggregator(config: RunConfig, half: ClientHalf, strategy: Strategy) -> Aggregator:
    initial = {name: parameter.detach() for name, parameter in half.named_parameters()}
    return Aggregator(initial, strategy, config.optimizer, config.run.windows, rule_of(config.federation))


def _whole_windows(folder: RunFolder) -> frozenset[int]:
    """Windows that the run may go on with."""
    return folder.checkpoints.whole_windows(warn)


def _expectation(
    config: RunConfig, saved: frozenset[int] | None, tokenizer: Any, model_config: Any, run: str
) -> Expectation:
    clients_save = strategy_of(config.federation, config.wire, config.cut).halves_are_personal
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


def _bind(cores: frozenset[int]) -> frozenset[int]:
    """Bind this rank to these cores, if the system tells of any; returns them."""
    if cores:
        bind(cores)
    if (threads := threads_for(cores, os.environ)) is not None:
        torch.set_num_threads(threads)
    return cores


def _client_devices(choice: str) -> list[str]:
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] if choice == "cuda" else ["cpu"]


def _dtype(config: RunConfig) -> torch.dtype:
    return torch.bfloat16 if config.body.precision == "bf16" else torch.float32


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")
