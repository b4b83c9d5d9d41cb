"""A client's connection: join the coordinator, stream with a rank, end with the run."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import torch

from fedbert_ds.client.footprint import peak_memory_bytes, return_free_memory
from fedbert_ds.client.inspection import description
from fedbert_ds.client.limits import Limits, check_peak
from fedbert_ds.client.own_data import MASKED_LM, OwnData, Share, read_own_data
from fedbert_ds.client.parties import Parties
from fedbert_ds.client.remembered_text import RememberedText
from fedbert_ds.client.state import claim, run_of, whole_windows
from fedbert_ds.client.trainer import ClientTrainer
from fedbert_ds.client.welcome import Asked, read_welcome
from fedbert_ds.config import Cut
from fedbert_ds.data.tokenizer import load_tokenizer, tokenizer_from_bytes, vocabulary_hash
from fedbert_ds.errors import (
    ConfigError,
    ConnectionLost,
    ModelError,
    RunOver,
    ServerAway,
    UserError,
    WireError,
    one_line,
    warn,
)
from fedbert_ds.federation.strategy import Strategy
from fedbert_ds.folder_lock import locked
from fedbert_ds.model.checkpoint import shape_hash
from fedbert_ds.model.cut import client_skeleton
from fedbert_ds.wire import address_file
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.channel import TlsFiles, await_ready, connect, is_loopback
from fedbert_ds.wire.host_port import parted
from fedbert_ds.wire.http_proxy import proxy_note
from fedbert_ds.wire.introduction import join
from fedbert_ds.wire.messages import PROTOCOL, cut_to_json
from fedbert_ds.wire.stream import AggregatorStream, ServerStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class ClientOptions:
    """What a user gives a client."""

    server: str
    """host:port of the coordinator, or a file that holds it: the run folder's `server.address`."""
    data: tuple[str, ...]
    """Files, folders or hub names, as `data.source` of the run file."""
    name: str
    state_folder: Path
    tokenizer: str | None = None
    """Hub name or folder; None takes the server's."""
    model: str | None = None
    """Hub name or folder of a model of the shape that the run must have; None takes any."""
    cut: Cut | None = None
    """The cut that the run must have; None takes any."""
    tls: TlsFiles | None = None
    plaintext: bool = False
    """Without `tls`, also beyond this machine."""
    token: str = field(default="", repr=False)
    """Of a launcher that started this client."""
    held_out: float | None = None
    """Share of the articles that is kept out of training; None: the run's."""
    task: str = MASKED_LM
    """What `data` is read for, as `task.name` of the run file; the run must have it."""
    text_columns: tuple[str, ...] = ()
    """Columns of tables with the text; none: as the task names them, or `text`."""
    label_column: str | None = None
    encoding: str | None = None
    """Of text files without a byte order mark; None: UTF-8, or what a file looks like."""
    cache: Path | None = None
    """Folder of its text as tokens, kept for the next start; None keeps them in memory."""
    device: str | None = None
    """`cpu`, `cuda`, `cuda:1`, ...; None: accelerate chooses."""
    join_timeout: float = 3600.0
    """Seconds to wait for the other clients."""
    connect_timeout: float = 60.0
    """Seconds to reach the server at all."""
    rejoin_timeout: float = 0.0
    """Seconds to wait for a server that is gone, or that has stopped and saved, to be back; 0 ends
    the client with it."""
    managed: bool = False
    """A launcher started this client and ends it through the server; signals are ignored."""
    limits: Limits = field(default_factory=Limits)


BACKOFF_SECONDS = (0.5, 30.0)
"""First and longest wait before joining again; it doubles, times 0.5 to 1.5 at random."""

LONGEST_DIAL_SECONDS = 20.0
"""After that long the address is looked up again."""

STOPPED = 75
"""Exit code of a client whose run was stopped and can be resumed (EX_TEMPFAIL of sysexits.h)."""


def check_server(server: str) -> None:
    """ConfigError for what is neither HOST:PORT nor a run's file server.address."""
    if server.endswith(address_file.SUFFIX):
        return
    try:
        parted(server)
    except ValueError as error:
        raise ConfigError(f"--server {server}: {error}; or name the file server.address of a run") from None


def run_client(options: ClientOptions) -> int:
    """Take part in a run from join to finish; returns the exit code, 0 or STOPPED.

    With `rejoin_timeout` it joins again, as often as it takes, when the server is gone or has
    stopped. A run that became complete without this client ends well for it, too. Raises DataError
    for missing or empty text, WireError for a server that cannot be reached or refuses, RunError
    for a state that cannot be read.
    """
    if options.managed:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    check_server(options.server)
    patience, is_saved = options.connect_timeout, False
    while True:
        try:
            finish = _take_part(options, patience)
        except RunOver:
            print(f"client {options.name}: the run is complete", flush=True)
            return 0
        except ServerAway:
            if is_saved:
                return STOPPED
            raise
        except ConnectionLost as lost:
            if not options.rejoin_timeout:
                raise
            reason, is_saved = str(lost), False
        else:
            if finish.complete:
                return 0
            if not options.rejoin_timeout:
                return STOPPED
            reason, is_saved = one_line(finish.reason), True
        patience = options.rejoin_timeout
        print(f"client {options.name}: {reason}; joins again, for {patience:.0f} s at most", flush=True)


def _take_part(options: ClientOptions, patience: float) -> pb.Finish:
    """Join within `patience` seconds and train until the server ends it."""
    # What can be wrong on this machine is told before others count on this client.
    device = _device(options.device)
    own = read_own_data(
        options.data, options.task, options.text_columns, options.label_column, options.encoding, options.cache
    )

    def tell(sentence: str) -> None:
        print(f"client {options.name}: {sentence}", flush=True)

    for sentence in own.summary:
        tell(sentence)
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    if own.takes_long:
        _tokenize(own, options, tokenizer, patience)
    hello = pb.Hello(
        protocol=PROTOCOL,
        client=options.name,
        shard_characters=own.num_characters,
        vocabulary_hash=vocabulary_hash(tokenizer) if tokenizer else "",
        shape_hash=_shape_of(options.model) if options.model else "",
        cut=cut_to_json(options.cut) if options.cut else "",
        saved_windows=whole_windows(options.state_folder, warn),
        run=run_of(options.state_folder),
        task=options.task,
        token=options.token,
    )
    welcome = _join(options, hello, patience)
    # The server has written its file by now. What this client looked up may have been the file of
    # the one before it, at the same port.
    is_over = address_file.news_of(options.server)
    with ExitStack() as at_end:
        with _leaving_on_failure(options, welcome, is_over):
            asked = read_welcome(welcome, options.limits)
            print(f"client {options.name}: joined; serving rank at {one_line(welcome.endpoint)}", flush=True)
            if tokenizer is None:
                tokenizer = tokenizer_from_bytes(welcome.tokenizer)
            if asked.strategy.halves_are_personal:
                at_end.enter_context(locked(options.state_folder, "--state"))
                claim(options.state_folder, welcome.run)
            share = Share(options.name, _held_out(options, asked), asked.evaluate_tokens)
            text, held_out_text = own.encoded(tokenizer, asked.model_config, asked.settings, share)
            at_end.callback(text.text.close)
            for sentence in own.tokens_told:
                tell(sentence)
            remembered = RememberedText(text, own.num_articles, options.state_folder, welcome.run, tell)
            del own, tokenizer
            return_free_memory()
            half = client_skeleton(asked.model_config, asked.cut)
        stream = _open_streams(at_end, options, welcome, is_over, asked.strategy)
        trainer = ClientTrainer(
            half,
            remembered,
            asked.settings,
            options.name,
            options.state_folder,
            device,
            stream.send,
            held_out_text,
        )
        while trainer.finish is None:
            trainer.handle(stream.receive())
            check_peak(peak_memory_bytes(), options.limits)
    print(
        f"client {options.name}: {one_line(trainer.finish.reason)}; peak memory {peak_memory_bytes() / 1e6:.0f} MB, "
        f"{trainer.flops_per_token() / 1e6:.2f} MFLOP per token",
        flush=True,
    )
    return trainer.finish


@contextmanager
def _leaving_on_failure(options: ClientOptions, welcome: pb.Welcome, is_over: Callable[[], bool]) -> Iterator[None]:
    """If the block fails, tell the server that this client leaves: it has been let in, and nobody
    shall wait for it.
    """
    try:
        yield
    except BaseException:
        with suppress(UserError), _server_stream(options, welcome, is_over):
            pass  # whoever hangs up says goodbye
        raise


def _tokenize(own: OwnData, options: ClientOptions, tokenizer: PreTrainedTokenizerFast | None, patience: float) -> None:
    """Make the tokens that the run needs before this client has a seat, which waits for
    `clients.join_timeout` alone.
    """
    visit = pb.Hello(protocol=PROTOCOL, client=options.name, inspect=True, token=options.token)
    welcome = _join(options, visit, patience)
    # A visitor is told of the tokens of all clients: no more than this one's are limited.
    asked = read_welcome(welcome, replace(options.limits, max_tokens=sys.maxsize))
    share = Share(options.name, _held_out(options, asked), asked.evaluate_tokens)
    stream, _ = own.encoded(
        tokenizer or tokenizer_from_bytes(welcome.tokenizer), asked.model_config, asked.settings, share
    )
    stream.text.close()


def inspect_run(options: ClientOptions) -> str:
    """What the run at `options.server` would have this client send, to whom, and what that gives
    away: lines for its owner. Nothing of the data is read; the server gives no seat away.

    Raises WireError for a server that cannot be reached, and for a run outside `options.limits`.
    """
    welcome, asked = look_at_run(options)
    server = address_file.look_up(options.server)
    return description(asked, server, welcome.aggregator, options.tls is not None, _held_out(options, asked))


def look_at_run(options: ClientOptions) -> tuple[pb.Welcome, Asked]:
    """What the run at `options.server` would ask of this client. Raises as `inspect_run`."""
    check_server(options.server)
    hello = pb.Hello(protocol=PROTOCOL, client=options.name, inspect=True, token=options.token)
    welcome = _join(options, hello, options.connect_timeout)
    return welcome, read_welcome(welcome, options.limits)


def _held_out(options: ClientOptions, asked: Asked) -> float:
    return asked.held_out if options.held_out is None else options.held_out


def _open_streams(
    at_end: ExitStack,
    options: ClientOptions,
    welcome: pb.Welcome,
    is_over: Callable[[], bool],
    strategy: Strategy,
) -> ServerStream | Parties:
    """The stream to this client's rank, and to the aggregator of another party if there is one:
    ranks that start again open a new session with it, too.
    """
    tls, name, timeout = options.tls, options.name, welcome.reconnect_timeout
    server = at_end.enter_context(_server_stream(options, welcome, is_over))
    if not welcome.aggregator:
        return server
    _check_plaintext(welcome.aggregator, options)
    print(f"client {name}: client updates go to the aggregator at {one_line(welcome.aggregator)}", flush=True)
    aggregator = at_end.enter_context(
        AggregatorStream(welcome.aggregator, tls, name, welcome.aggregator_session, timeout, is_over=is_over)
    )
    return Parties(server, aggregator, strategy)


def _server_stream(options: ClientOptions, welcome: pb.Welcome, is_over: Callable[[], bool]) -> ServerStream:
    _check_plaintext(welcome.endpoint, options)
    return ServerStream(
        welcome.endpoint,
        options.tls,
        options.name,
        welcome.session,
        welcome.reconnect_timeout,
        token=options.token,
        is_over=is_over,
    )


def _shape_of(model: str) -> str:
    from transformers import AutoConfig

    try:
        return shape_hash(AutoConfig.from_pretrained(model, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise ModelError(f"--model {model}: no such model; give a folder or hub name") from error


def _join(options: ClientOptions, hello: pb.Hello, patience: float) -> pb.Welcome:
    """The server's answer to a Join; ServerAway if none answers within `patience` seconds.

    RunOver if the run is complete and nobody extends it within `connect_timeout`.
    """
    begun, (backoff, longest) = time.monotonic(), BACKOFF_SECONDS
    deadline = begun + patience
    while True:
        seconds_left = max(0.1, deadline - time.monotonic())
        is_news = address_file.news_of(options.server)
        try:
            # It may come back elsewhere, so its address is looked up every time.
            return _ask(address_file.look_up(options.server), options, hello, seconds_left, is_news)
        except ServerAway as away:
            if isinstance(away, RunOver):
                deadline = min(deadline, begun + options.connect_timeout)
            if time.monotonic() + backoff > deadline and not is_news():
                raise
        address_file.await_news(is_news, backoff * random.uniform(0.5, 1.5))
        backoff = min(2 * backoff, longest)


def _ask(
    address: str, options: ClientOptions, hello: pb.Hello, patience: float, is_elsewhere: Callable[[], bool]
) -> pb.Welcome:
    _check_plaintext(address, options)
    with connect(address, options.tls) as channel:
        try:
            await_ready(channel, address, options.tls, min(patience, LONGEST_DIAL_SECONDS), is_elsewhere)
        except grpc.FutureTimeoutError:
            raise ServerAway(
                f"{address}: no server answers; check --server, that it runs, and TLS on both sides"
                f"{proxy_note(address)}"
            ) from None
        try:
            welcome: pb.Welcome = join(channel, hello, options.join_timeout).result()
            return welcome
        except grpc.RpcError as error:
            raise _wire_error(address, error) from error


def _check_plaintext(address: str, options: ClientOptions) -> None:
    """ConfigError for plain text beyond this machine that nobody asked for."""
    if options.tls is None and not (options.plaintext or is_loopback(address)):
        raise ConfigError(
            f"{address} is beyond this machine, and without TLS anybody on the way could read along or pose as the "
            "server; give --ca, --certificate and --key (fedbert-ds certs makes them), or --plaintext"
        )


def _wire_error(address: str, error: grpc.RpcError) -> WireError:
    code, details = error.code(), error.details() or "no details"
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return WireError(f"the server refused this client: {details}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return WireError(f"{address}: the other clients did not come in time; raise --join-timeout or start them")
    return ServerAway(f"{address}: connection lost ({code.name.lower()}: {details}); start this client again")


def _device(name: str | None) -> torch.device:
    """ConfigError for a device that cannot compute here."""
    if name is not None:
        try:
            torch.zeros(1, device=name).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"--device {name}: cannot be used here ({reason}); try --device cpu") from None
        return torch.device(name)
    from accelerate import PartialState

    return PartialState().device
