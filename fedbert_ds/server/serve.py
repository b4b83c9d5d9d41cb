"""A rank's whole life: agree on the run, build the body, let clients in, train, and hand the result over."""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fedbert_ds.config import RunConfig, dump_config, load_config
from fedbert_ds.data.tokenizer import tokenizer_from_bytes, tokenizer_to_bytes, vocabulary_hash
from fedbert_ds.errors import ConfigError, RunError, WireError
from fedbert_ds.federation.strategy import exchange_codec, is_exchanged
from fedbert_ds.model.body import Body
from fedbert_ds.model.checkpoint import build_model, config_to_json, longest_sequence, shape_hash
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.model.cut import split
from fedbert_ds.model.kernels import check_kernels
from fedbert_ds.server.admission import Expectation, Roster, Seat
from fedbert_ds.server.body.engine import BodyEngine, zero_stage
from fedbert_ds.server.inbox import Shapes
from fedbert_ds.server.local_clients import LocalClients, client_name
from fedbert_ds.server.network.decoding import Decoding
from fedbert_ds.server.network.endpoint import Endpoint
from fedbert_ds.server.network.endpoint_process import EndpointProcess
from fedbert_ds.server.network.events import POLL_SECONDS, JoinAbandoned, JoinAsked, RankEndpoint
from fedbert_ds.server.prepare import TextFacts, prepare_text, prepared_text
from fedbert_ds.server.rank import RankServer
from fedbert_ds.server.rank_group import RankGroup, complete_windows, ranks_of_checkpoints
from fedbert_ds.server.run_reporter import RunReporter
from fedbert_ds.telemetry.trace import Trace
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.channel import TlsFiles
from fedbert_ds.wire.messages import client_settings, cut_to_json

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
ADDRESS_FILE = "server.address"
UNCHANGED = (
    "model",
    "cut",
    "tokenizer",
    "data",
    "federation",
    "wire.updates",
    "run.seed",
    "optimizer.name",
    "body.zero_stage",
    "body.precision",
    "clients.expected",
    "clients.local",
)
"""Keys that must be the same when a run resumes."""
INTERRUPTED = 130
"""Exit code of a run that was stopped and saved, as a shell reports Ctrl-C."""


@dataclass(frozen=True)
class Prepared:
    """What rank 0 prepared and every rank needs before it can build its body."""

    tokenizer: bytes
    facts: TextFacts | None


@dataclass(frozen=True)
class Start:
    """What the coordinator decided when everybody had joined."""

    seats: dict[str, Seat]
    first_window: int


class StopSignal:
    """Ctrl-C, SIGTERM (a launcher) and SIGUSR1 (SLURM's warning) make the run save and end; a second Ctrl-C kills."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def check_before_start(config: RunConfig, resume: bool) -> None:
    """Everything that can be wrong with the device and the run's folder; a UserError before anything is written."""
    check_kernels(config.kernels, _device())
    folder = config.run.directory
    if resume:
        if not (folder / CONFIG_FILE).is_file():
            raise RunError(f"{folder}: no run to resume here; drop --resume or set run.directory")
        if not complete_windows(folder / CHECKPOINTS):
            raise RunError(f"{folder}: this run saved no checkpoint; drop --resume and set another run.directory")
        _check_unchanged(load_config(folder / CONFIG_FILE), config)
        ranks, world_size = ranks_of_checkpoints(folder / CHECKPOINTS), int(os.environ.get("WORLD_SIZE", 1))
        if ranks != world_size:
            raise RunError(f"{folder}: was saved by {ranks} ranks, this is {world_size}; start it with {ranks} ranks")
    elif folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder}: holds a run already; add --resume to continue it, or set another run.directory")


def _check_unchanged(saved: RunConfig, now: RunConfig) -> None:
    """A run that resumes must be the run it was; RunError names the first of UNCHANGED that differs."""
    before, after = saved.model_dump(), now.model_dump()
    before["body"]["zero_stage"], after["body"]["zero_stage"] = zero_stage(saved), zero_stage(now)
    for path in UNCHANGED:
        old, new = before, after
        for part in path.split("."):
            old, new = old[part], new[part]
        if old != new:
            raise RunError(
                f"{path} is {new} now and was {old} when {saved.run.directory} was saved; change it back, "
                "or drop --resume and set another run.directory"
            )


def serve(config: RunConfig, resume: bool) -> int:
    """Run this rank to the end and return its exit code; torch.distributed is initialized.

    A UserError is raised on the rank it concerns; the launcher then ends the others.
    """
    stop = StopSignal()
    rank_group = RankGroup()
    clients = LocalClients(config.run.directory / "clients")
    port = config.server.port and config.server.port + rank_group.rank
    endpoint = _endpoint(config, port)
    decoding: Decoding | None = None
    rank: RankServer | None = None
    trace = Trace(config.run.directory / f"trace-{rank_group.rank}.json" if config.run.trace else None, rank_group.rank)
    try:
        port = endpoint.start()
        endpoints = rank_group.gather(f"{_advertised(config, rank_group.world_size)}:{port}")
        prepared = rank_group.broadcast(_prepare(config, resume) if rank_group.rank == 0 else None)
        tokenizer = tokenizer_from_bytes(prepared.tokenizer)
        model_config, half, body = _halves(config, tokenizer)
        reporter = RunReporter(config, rank_group, prepared.facts, half, body)
        device = _device()
        engine = BodyEngine.build(body.to(device), config, device)
        roster = _roster(config, resume, tokenizer, model_config)
        if rank_group.rank == 0:
            _reveal_address(config.run.directory, endpoints[0])
            reporter.announce(endpoints[0])
            clients.start(f"{_reachable(config.server.host)}:{port}", _local_names(config))
            _fill(roster, config, endpoint, clients, stop)
        start = rank_group.broadcast(_start(config, roster, rank_group) if rank_group.rank == 0 else None)
        endpoint.admit({name: seat.session for name, seat in start.seats.items() if seat.rank == rank_group.rank})
        shapes = _shapes(config, half)
        most_tokens = max(config.window.tokens_per_micro_batch, shapes.longest_sequence)
        decoding = Decoding(endpoint.next_event, shapes, config.wire, most_tokens)
        rank = RankServer(
            config,
            shapes,
            engine,
            endpoint,
            rank_group,
            start.seats,
            start.first_window,
            stop,
            trace,
            decoding.next_event,
        )
        decoding.start()
        if start.first_window:
            engine.load(config.run.directory / CHECKPOINTS, start.first_window)
        # A client may come as soon as it is welcomed, so every rank must be ready for it.
        rank_group.barrier()
        if rank_group.rank == 0:
            _welcome(config, roster, start, endpoints, prepared.tokenizer, config_to_json(model_config))
        initial = {name: p.detach() for name, p in half.named_parameters()} if start.first_window == 0 else None
        rank.connect(initial, clients.check)
        window = _train(config, rank, clients, reporter, start.first_window)
        # Clients end in there; one that is started again must not find this run's address.
        _hide_address(config, rank_group)
        reporter.hand_over(window, rank, engine, model_config, tokenizer)
        clients.wait(seconds=30)
        # A launcher ends all ranks when the first one leaves with an exit code, and rank 0 is still writing.
        rank_group.barrier()
        # Rank 0 speaks for the run; launchers take any other code of any rank for a crash.
        return INTERRUPTED if rank_group.rank == 0 and window < config.run.windows else 0
    finally:
        _hide_address(config, rank_group)
        if rank is not None:
            rank.settle()
        if decoding is not None:
            decoding.stop()
        endpoint.stop()
        clients.stop()
        trace.close()


def _halves(config: RunConfig, tokenizer: Any) -> tuple[Any, ClientHalf, Body]:
    """(transformers config, client half, body) of the model that every rank builds alike from the run's seed."""
    model = build_model(config.model, len(tokenizer), tokenizer.pad_token_id, config.run.seed)
    _check_lengths(config, model.config)
    half, body = split(model, config.cut)
    if config.body.activation_checkpointing:
        body.enable_activation_checkpointing()
    return model.config, half, body


def _prepare(config: RunConfig, resume: bool) -> Prepared:
    if resume:
        tokenizer, facts = prepared_text(config)
        (config.run.directory / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
    else:
        config.run.directory.mkdir(parents=True, exist_ok=True)
        try:
            tokenizer, facts = prepare_text(config)
        except BaseException:
            _remove_if_unused(config.run.directory)
            raise
        (config.run.directory / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
    return Prepared(tokenizer_to_bytes(tokenizer), facts)


def _remove_if_unused(folder: Path) -> None:
    """A run that failed before it began leaves no folder in the way of the next try."""
    import shutil

    if not (folder / CONFIG_FILE).exists():
        shutil.rmtree(folder, ignore_errors=True)


def _reveal_address(folder: Path, address: str) -> None:
    """Scripts that start clients read the coordinator's address here, which matters with server.port: 0."""
    partial = folder / f"{ADDRESS_FILE}.partial"
    partial.write_text(address + "\n", encoding="utf-8")
    partial.replace(folder / ADDRESS_FILE)


def _hide_address(config: RunConfig, rank_group: RankGroup) -> None:
    if rank_group.rank == 0:
        (config.run.directory / ADDRESS_FILE).unlink(missing_ok=True)


def _roster(config: RunConfig, resume: bool, tokenizer: Any, hf_config: Any) -> Roster:
    saved = complete_windows(config.run.directory / CHECKPOINTS) if resume else None
    expectation = Expectation(vocabulary_hash(tokenizer), shape_hash(hf_config), cut_to_json(config.cut), saved)
    return Roster(config.clients.expected, expectation)


def _fill(roster: Roster, config: RunConfig, endpoint: RankEndpoint, clients: LocalClients, stop: StopSignal) -> None:
    """Wait until every expected client has joined; RunError after clients.join_timeout, naming who is there."""
    deadline = time.monotonic() + config.clients.join_timeout
    while not roster.is_complete:
        match endpoint.next_event(POLL_SECONDS):
            case JoinAsked(hello, answer):
                try:
                    roster.admit(hello, answer)
                except WireError as refusal:
                    print(f"refused: {refusal}", flush=True)
            case JoinAbandoned(hello):
                roster.withdraw(hello)
        clients.check()
        if stop.requested or time.monotonic() > deadline:
            here = ", ".join(roster.clients) or "none"
            reason = (
                "stopped" if stop.requested else f"{config.clients.join_timeout:.0f} s are over (clients.join_timeout)"
            )
            error = RunError(f"{reason} before all {config.clients.expected} clients joined; here: {here}")
            roster.refuse_all(WireError(str(error)))
            raise error


def _start(config: RunConfig, roster: Roster, rank_group: RankGroup) -> Start:
    try:
        first_window = roster.first_window()
    except WireError as error:
        roster.refuse_all(error)
        raise
    return Start(roster.seats(rank_group.world_size, config.window.tokens, config.window.share), first_window)


def _welcome(
    config: RunConfig, roster: Roster, start: Start, endpoints: list[str], tokenizer: bytes, model_config: str
) -> None:
    for client, seat in start.seats.items():
        settings = client_settings(
            config.run, config.data, config.optimizer, config.federation, config.wire, seat.tokens
        )
        welcome = pb.Welcome(
            endpoint=endpoints[seat.rank],
            session=seat.session,
            model_config=model_config,
            cut=cut_to_json(config.cut),
            settings=settings.model_dump_json(),
            tokenizer=tokenizer,
            window=start.first_window,
            reconnect_timeout=config.clients.reconnect_timeout,
        )
        roster.welcome(client, welcome)


def _train(config: RunConfig, rank: RankServer, clients: LocalClients, reporter: RunReporter, first_window: int) -> int:
    with reporter.following(first_window):
        try:
            return rank.train(reporter.window, config.run.directory / CHECKPOINTS)
        except RunError as error:
            rank.finish(f"the run ended: {error}", complete=False)
            reasons = "; ".join(clients.failures(patience=15.0))
            raise RunError(f"{reasons}; {error}" if reasons else str(error)) from error


def _shapes(config: RunConfig, half: ClientHalf) -> Shapes:
    parameters = {name: tuple(parameter.shape) for name, parameter in half.named_parameters()}
    return Shapes(
        activation_width=half.widths.activations,
        hidden_width=half.widths.hidden,
        longest_sequence=config.data.sequence_length,
        is_rows_cut=config.cut == "rows",
        half=parameters,
        exchanged=frozenset(name for name in parameters if is_exchanged(config.federation, half.parameter_scope(name))),
        exchange_codec=exchange_codec(config.federation, config.wire),
    )


def _check_lengths(config: RunConfig, hf_config: Any) -> None:
    if config.data.sequence_length > longest_sequence(hf_config):
        raise ConfigError(
            f"data.sequence_length {config.data.sequence_length} is longer than the model's position table, "
            f"{longest_sequence(hf_config)}; lower it"
        )


def _local_names(config: RunConfig) -> list[str]:
    return [client_name(number) for number in range(config.clients.local)]


def _tls(config: RunConfig) -> TlsFiles | None:
    tls = config.server.tls
    return TlsFiles(tls.ca, tls.certificate, tls.key) if tls else None


def _endpoint(config: RunConfig, port: int) -> RankEndpoint:
    """The endpoint of a rank, not yet listening; under `auto` a process of its own only beside a GPU."""
    server = config.server
    # Measured with `bench ingress`: a process of its own pays where the body leaves cores idle.
    in_process = server.network == "process" or (server.network == "auto" and torch.cuda.is_available())
    kind = EndpointProcess if in_process else Endpoint
    return kind(server.host, port, _tls(config), config.clients.reconnect_timeout, server.shared_memory)


def _advertised(config: RunConfig, world_size: int) -> str:
    """The host clients are told for this rank's endpoint."""
    if config.server.advertise:
        return config.server.advertise
    on_several_nodes = world_size > int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size)))
    if on_several_nodes or config.server.host == "0.0.0.0":
        return socket.gethostname()
    return config.server.host


def _reachable(host: str) -> str:
    return "127.0.0.1" if host == "0.0.0.0" else host


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")
