"""Admission to a run: check joins; give every client a rank, a share and a welcome."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from fedbert_ds.config import RunConfig, WindowSection
from fedbert_ds.errors import RunError, WireError
from fedbert_ds.server.network.events import POLL_SECONDS, Event, JoinAbandoned, JoinAsked, reply
from fedbert_ds.server.queue.seats import assign_clients, window_shares
from fedbert_ds.server.stop_signal import StopFlag
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.messages import PROTOCOL, client_settings, cut_to_json

LONGEST_NAME = 100
"""Characters of a client's name. Every message about the client holds it."""


@dataclass(frozen=True)
class Expectation:
    """What a client's Hello must match."""

    vocabulary_hash: str
    shape_hash: str
    cut: str
    """JSON, as in a Welcome."""
    saved_windows: frozenset[int] | None = None
    """Windows the server has checkpoints of, when it resumes; None for a run that starts."""
    clients_save: bool = True
    """Clients keep states of their own, and can resume from these windows only."""


@dataclass(frozen=True)
class Seat:
    """A client's rank and share."""

    rank: int
    session: str
    tokens: int
    """Tokens of the client in each window."""
    aggregator_session: str = ""
    """Shown to an aggregator of another party, which must not know the rank's session."""


@dataclass(frozen=True)
class Start:
    """The coordinator's decision once all clients have joined."""

    seats: dict[str, Seat]
    first_window: int


@dataclass
class Joins:
    """The joins so far. `admit` checks one, `seats` places them all."""

    expected: int
    expectation: Expectation
    _waiting: dict[str, tuple[pb.Hello, Future[pb.Welcome]]] = field(default_factory=dict)

    def admit(self, hello: pb.Hello, answer: Future[pb.Welcome]) -> None:
        """Take a client in. A refusal answers the client and raises WireError with the reason."""
        try:
            self._check(hello)
        except WireError as error:
            reply(answer, error)
            raise
        self._waiting[hello.client] = (hello, answer)

    def withdraw(self, hello: pb.Hello) -> None:
        """Forget a client that left before all had joined."""
        waiting = self._waiting.get(hello.client)
        # A second client of the same name may have joined since; it stays.
        if waiting is not None and waiting[0] is hello:
            del self._waiting[hello.client]

    @property
    def clients(self) -> tuple[str, ...]:
        """Names of the clients that have joined, sorted."""
        return tuple(sorted(self._waiting))

    @property
    def is_complete(self) -> bool:
        """All expected clients have joined."""
        return len(self._waiting) >= self.expected

    def first_window(self) -> int:
        """Where the run begins: 0, or the newest window saved by the server and every client that
        has to save.

        Raises WireError if there is none.
        """
        if self.expectation.saved_windows is None:
            return 0
        common = set(self.expectation.saved_windows)
        if self.expectation.clients_save:
            for hello, _ in self._waiting.values():
                common &= set(hello.saved_windows)
        if not common:
            raise WireError(
                f"no window is saved by the server ({_listed(self.expectation.saved_windows)}) and by every client; "
                "start clients with the --state folders of the first run, or drop --resume and change run.directory"
            )
        return max(common)

    def seats(self, world_size: int, window_tokens: int, share: str) -> dict[str, Seat]:
        """A rank, a session and a share of the window for each client.

        Ranks and shares depend on names and text sizes alone.
        """
        shard_sizes = {client: hello.shard_characters for client, (hello, _) in self._waiting.items()}
        shares = window_shares(shard_sizes, window_tokens, share)
        ranks = assign_clients(shares, world_size)
        return {
            client: Seat(ranks[client], secrets.token_hex(16), shares[client], secrets.token_hex(16))
            for client in sorted(self._waiting)
        }

    def welcome(self, client: str, welcome: pb.Welcome) -> None:
        """Answer a client's Join."""
        reply(self._waiting[client][1], welcome)

    def refuse_all(self, error: WireError) -> None:
        """Answer every waiting client with an error: the run does not start."""
        for _, answer in self._waiting.values():
            reply(answer, error)

    def _check(self, hello: pb.Hello) -> None:
        if not hello.client:
            raise WireError("a client without a name; give it one with --id")
        if len(hello.client) > LONGEST_NAME or not hello.client.isprintable():
            raise WireError(f"a client's name is at most {LONGEST_NAME} printable characters; give it another --id")
        who = f"client {hello.client}"
        if hello.protocol != PROTOCOL:
            raise WireError(
                f"{who} speaks protocol {hello.protocol}, this server {PROTOCOL}; install the same fedbert-ds on both"
            )
        if hello.client in self._waiting:
            raise WireError(f"{who} has joined already; give each client its own --id")
        if self.is_complete:
            raise WireError(f"{who}: all {self.expected} clients have joined; raise clients.expected")
        if hello.vocabulary_hash and hello.vocabulary_hash != self.expectation.vocabulary_hash:
            raise WireError(f"{who} has another vocabulary than the run; drop --tokenizer or name the run's")
        if hello.shape_hash and hello.shape_hash != self.expectation.shape_hash:
            raise WireError(f"{who} has another model than the run; drop --model or name the run's")
        if hello.cut and hello.cut != self.expectation.cut:
            raise WireError(f"{who} insists on cut {hello.cut[:80]}, the run has {self.expectation.cut}; drop --cut")
        if hello.shard_characters == 0:
            raise WireError(f"{who} has no text; check its --data")
        resumes_from_states = self.expectation.saved_windows is not None and self.expectation.clients_save
        if resumes_from_states and not hello.saved_windows:
            raise WireError(f"{who} has no saved state to resume from; give it the --state folder of the first run")


def fill(
    joins: Joins,
    next_event: Callable[[float], Event | None],
    join_timeout: float,
    stop: StopFlag,
    watch: Callable[[], None],
) -> None:
    """Take joins until every expected client has joined.

    `watch` runs while waiting; it raises for a local client process that died. After `join_timeout`
    seconds or a stop request, raises RunError with the names of the clients that joined, and sends
    them the same error.
    """
    deadline = time.monotonic() + join_timeout
    while not joins.is_complete:
        match next_event(POLL_SECONDS):
            case JoinAsked(hello, answer):
                try:
                    joins.admit(hello, answer)
                except WireError as refusal:
                    print(f"refused: {refusal}", flush=True)
            case JoinAbandoned(hello):
                joins.withdraw(hello)
        watch()
        if stop.requested or time.monotonic() > deadline:
            here = ", ".join(joins.clients) or "none"
            reason = "stopped" if stop.requested else f"{join_timeout:.0f} s are over (clients.join_timeout)"
            error = RunError(f"{reason} before all {joins.expected} clients joined; here: {here}")
            joins.refuse_all(WireError(str(error)))
            raise error


def start_of(joins: Joins, world_size: int, window: WindowSection) -> Start:
    """The first window and every client's seat.

    Raises WireError, and sends it to every client, if there is no window to resume from.
    """
    try:
        first_window = joins.first_window()
    except WireError as error:
        joins.refuse_all(error)
        raise
    return Start(joins.seats(world_size, window.tokens, window.share), first_window)


def welcome_all(
    joins: Joins,
    start: Start,
    config: RunConfig,
    endpoints: Sequence[str],
    tokenizer: bytes,
    model_config: str,
    cursors: Mapping[str, Mapping[str, int]],
) -> None:
    """Answer every client's Join with its rank's address, its session, the model and the settings
    of the run.

    `cursors` say where the texts of a resumed run go on, by client: `epoch`, `position` and
    `sequences`.
    """
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
            cursor=pb.Cursor(**cursors[client]) if client in cursors else None,
        )
        if config.aggregator is not None:
            welcome.aggregator, welcome.aggregator_session = config.aggregator.address, seat.aggregator_session
        joins.welcome(client, welcome)


def _listed(windows: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(windows))) or "none"
