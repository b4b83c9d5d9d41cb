"""The life of an aggregator process: listen, serve the run that a coordinator names, end."""

from __future__ import annotations

import secrets
import time
from typing import Any

from fedbert_ds.aggregator.endpoint import AggregatorEndpoint, OpenAsked, Ordered
from fedbert_ds.aggregator.folder import AggregatorFolder, folder_of
from fedbert_ds.aggregator.run import AggregatedRun, ClientModel
from fedbert_ds.config import AggregatorSection, RunConfig
from fedbert_ds.errors import ConfigError, RunError, UserError, WireError, one_line, warn
from fedbert_ds.federation.agreement import agreement, disagreement
from fedbert_ds.federation.strategy import strategy_of_run
from fedbert_ds.folder_lock import locked
from fedbert_ds.model.checkpoint import build_model, shape_hash
from fedbert_ds.model.cut import split
from fedbert_ds.server.network.door import DoorRules
from fedbert_ds.server.network.events import POLL_SECONDS, Connected, Disconnected, JoinAsked, Received, reply
from fedbert_ds.server.network.handshakes import tell_failed_handshakes
from fedbert_ds.server.network.limits import most_kept
from fedbert_ds.tasks.registry import task_of_section
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.aggregation import is_secret, rank_name, read_secret
from fedbert_ds.wire.channel import is_loopback
from fedbert_ds.wire.messages import PROTOCOL
from fedbert_ds.wire.tls import TlsFiles, expiry_warning

COMBINING_POLL_SECONDS = 0.002
"""Longest wait for an event while updates are being combined: no event marks their end."""

MOST_RANKS = 1 << 16
MOST_WORDS = 1 << 22

STOPPED = 75
"""Exit code after a run that was stopped and can be resumed, as a client's."""


def run_aggregator(config: RunConfig, resume: bool) -> int:
    """Serve one run to its end; returns the exit code, 0 or STOPPED.

    Waits `clients.join_timeout` seconds for a coordinator, also for one that comes back after its
    ranks were lost. Raises ConfigError without the section `aggregator` or its secret, RunError for
    a folder that does not fit or is in use, and when no coordinator comes, WireError if the port is
    in use.
    """
    section = config.aggregator
    if section is None:
        raise ConfigError("aggregator: the run file has no such section; give it an address and a secret")
    secret = read_secret(section.secret)
    folder = folder_of(config)
    folder.check(resume)
    tls = _checked_tls(section)
    # In plain text a name is no more than a word.
    rules = DoorRules(config.clients.allowed, section.tls.revoked) if section.tls else DoorRules()
    endpoint = AggregatorEndpoint(
        section.host, section.port, tls, config.clients.reconnect_timeout, config.server.shared_memory, rules
    )
    with locked(folder.path, "aggregator.directory"):
        try:
            endpoint.start()
            folder.write_config(config)
            print(f"aggregator at {section.address}, {folder.path}: waiting for the server", flush=True)
            return _Process(config, secret, endpoint, folder).serve()
        finally:
            endpoint.stop()


def _checked_tls(section: AggregatorSection) -> TlsFiles | None:
    """The files of mutual TLS. ConfigError where there are none and nobody asked for plain text."""
    if section.tls is None:
        if not (is_loopback(section.host) or section.plaintext):
            raise ConfigError(
                f"aggregator.host: {section.host} listens beyond this machine, in plain text: anybody on the way could "
                "read client updates or take a party's place; set aggregator.tls (fedbert-ds certs makes its files), "
                "or aggregator.plaintext: true"
            )
        return None
    tls = TlsFiles(section.tls.ca, section.tls.certificate, section.tls.key)
    tls.read()
    if (warning := expiry_warning(tls)) is not None:
        warn(warning)
    tell_failed_handshakes()
    tls.check_host(section.address.rpartition(":")[0].strip("[]"))
    return tls


class _Process:
    """The endpoint's events, to the run that is under way."""

    def __init__(self, config: RunConfig, secret: str, endpoint: AggregatorEndpoint, folder: AggregatorFolder) -> None:
        self._config = config
        self._secret = secret
        self._endpoint = endpoint
        self._folder = folder
        self._run: AggregatedRun | None = None
        self._lost_at = time.monotonic()
        """When there was a run last."""

    def serve(self) -> int:
        while True:
            is_busy = self._run is not None and self._run.is_busy
            event = self._endpoint.next_event(COMBINING_POLL_SECONDS if is_busy else POLL_SECONDS)
            try:
                self._take(event)
                if self._run is not None:
                    self._run.attend()
            except UserError as error:
                self._end_run(f"the aggregator cannot go on: {error}")
                raise
            if self._run is None:
                if time.monotonic() - self._lost_at > self._config.clients.join_timeout:
                    raise RunError(
                        f"no server came in {self._config.clients.join_timeout:.0f} s (clients.join_timeout); "
                        f"saved windows: {', '.join(map(str, self._folder.saved_windows())) or 'none'}"
                    )
            elif (finish := self._run.finish) is not None:
                self._run.close(None, finish)
                print(f"aggregator: {one_line(finish.reason)}", flush=True)
                return 0 if finish.complete else STOPPED

    def _take(self, event: Any) -> None:
        if not self._endpoint.hears(event):
            return
        match event:
            case OpenAsked(request, answer):
                try:
                    opened = self._open(request)
                except UserError as error:
                    print(f"refused: {error}", flush=True)
                    answer.set_exception(error)
                else:
                    answer.set_result(opened)
            case JoinAsked(hello, answer):
                reply(answer, WireError(f"client {hello.client[:100]}: this is the aggregator; join the server"))
            case Ordered(rank, order) if self._run is not None:
                self._run.order(rank, order)
            case Connected(client) if self._run is not None:
                self._run.connected(client)
            case Received(client, message) if self._run is not None:
                self._run.receive(client, message)
            case Disconnected(client) if self._run is not None:
                if client == rank_name(0) and self._run.finish is None:
                    self._end_run("the server is gone")
                    print("aggregator: the server is gone; waiting for it to come back with --resume", flush=True)
                else:
                    self._run.disconnected(client)

    def _open(self, request: pb.OpenRun) -> pb.Opened:
        """Begin the run of a coordinator that knows the secret; one that was under way is over."""
        if not is_secret(request.secret, self._secret):
            raise WireError("the server does not know the aggregator's secret; compare the files aggregator.secret")
        if request.protocol != PROTOCOL:
            raise WireError(
                f"the server speaks protocol {request.protocol}, this aggregator {PROTOCOL}; install the same "
                "fedbert-ds on both"
            )
        if (difference := disagreement(agreement(self._config), request.agreement)) is not None:
            raise ConfigError(difference)
        if not 0 < request.ranks <= MOST_RANKS:
            raise WireError(f"a server of {request.ranks} ranks")
        saved = self._folder.whole_windows(warn)
        if saved and not request.resume:
            raise RunError(
                f"the aggregator's folder {self._folder.path} holds a run; add --resume at the server, or set another "
                "aggregator.directory"
            )
        model = _client_model(self._config, request)
        self._end_run("another server took over")
        self._endpoint.keep_at_most(most_kept(model.exchanged))
        sessions = [secrets.token_hex(16) for _ in range(request.ranks)]
        self._run = AggregatedRun(self._config, model, sessions, self._endpoint, self._folder)
        return pb.Opened(sessions=sessions, saved_windows=saved if request.resume else ())

    def _end_run(self, reason: str) -> None:
        """Part with the ranks and clients of the run under way, if there is one."""
        if self._run is not None:
            failed = pb.Report(failed=pb.Failed(reason=reason))
            self._run.close(failed, pb.Finish(reason=reason, complete=False))
        self._run = None
        self._endpoint.admit({})
        self._lost_at = time.monotonic()


def _client_model(config: RunConfig, request: pb.OpenRun) -> ClientModel:
    """The first client model, by this party's run file; ConfigError if the server's has another
    shape.
    """
    assert config.aggregator is not None
    if not 0 < request.vocabulary <= MOST_WORDS or request.pad_token >= request.vocabulary:
        raise WireError(f"a vocabulary of {request.vocabulary} words with padding {request.pad_token}")
    seed = config.run.seed if config.aggregator.seed is None else config.aggregator.seed
    model = build_model(config.model, request.vocabulary, request.pad_token, seed, task_of_section(config.task))
    if shape_hash(model.config) != request.shape_hash:
        raise ConfigError("the server's model has another shape; give both run files the same section `model`")
    half, _ = split(model, config.cut)
    strategy = strategy_of_run(config)
    weights = {name: parameter.detach() for name, parameter in half.named_parameters()}
    exchanged = {n: tuple(w.shape) for n, w in weights.items() if strategy.takes_part(half.parameter_scope(n))}
    handed_over = {n: tuple(w.shape) for n, w in weights.items() if strategy.is_handed_over(half.parameter_scope(n))}
    return ClientModel(weights, exchanged, handed_over, model.config)
