"""Admission to a run: check joins; give every client a rank, a share and a welcome."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from fedbert_ds.config import RunConfig, WindowSection
from fedbert_ds.errors import RunError, WireError
from fedbert_ds.federation.sampler import Sampler
from fedbert_ds.server.network.door import Refusals
from fedbert_ds.server.network.events import POLL_SECONDS, Event, JoinAbandoned, JoinAsked, reply
from fedbert_ds.server.queue.roster import next_window_of
from fedbert_ds.server.queue.seats import assign_clients, window_shares
from fedbert_ds.server.stop_signal import StopFlag
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.identity import LONGEST_NAME, is_name
from fedbert_ds.wire.messages import PROTOCOL, client_settings, cut_to_json

MOST_CHARACTERS = 10**13
"""Of a client's text: ten terabytes."""


def new_session() -> str:
    """A secret that a client shows when it opens its stream."""
    return secrets.token_hex(16)


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
    """Clients keep states of their own."""
    run: str = ""
    """The run's id."""
    task: str = "masked_lm"
    """As the run file's `task.name`."""

    def own_states(self, hello: pb.Hello) -> frozenset[int]:
        """Windows of this run whose state the client has; `check_hello` refuses those of others."""
        return frozenset(hello.saved_windows) if self.clients_save else frozenset()


@dataclass(frozen=True)
class Seat:
    """A client's rank and share."""

    rank: int
    session: str
    tokens: int
    """Tokens of the client in each window that it takes part in."""
    saved_windows: frozenset[int] = frozenset()
    """Windows whose state the client has kept itself."""
    aggregator_session: str = field(default_factory=new_session)
    """Shown to an aggregator of another party, which must not know the rank's session."""


@dataclass(frozen=True)
class Start:
    """The coordinator's decision once all clients have joined."""

    seats: dict[str, Seat]
    first_window: int
    is_saved: bool = False
    """There is a checkpoint of `first_window` to begin with."""


class Members:
    """Everybody who has a seat, here or away, and who takes part; the same on every rank."""

    def __init__(self, seats: Mapping[str, Seat], sampler: Sampler) -> None:
        self.seats = dict(seats)
        self.sampler = sampler
        self.tokens = {client: seat.tokens for client, seat in self.seats.items()}
        """Tokens of each client in a window."""

    def admit(self, seats: Mapping[str, Seat], first_window: int) -> None:
        """Give seats to newcomers, or new sessions to members that come back.

        Newcomers count from `first_window` on, which nobody has planned, or from a later window:
        members are told their next turn far ahead, and it must stay theirs.
        """
        takes_part, before = self.sampler.takes_part, first_window - 1
        if newcomers := sorted(seats.keys() - self.seats.keys()):
            told = [next_window_of(member, takes_part, before, math.inf) for member in self.seats]
            for client in newcomers:
                self.sampler.admit(client, max(told, default=before) + 1)
        self.seats.update(seats)
        self.tokens.update({client: seat.tokens for client, seat in seats.items()})

    def at(self, rank: int) -> frozenset[str]:
        """The clients of a rank."""
        return frozenset(client for client, seat in self.seats.items() if seat.rank == rank)

    def note_states(self, clients: Iterable[str], window: int) -> None:
        """These clients have kept a state of their own of `window`, and of those before it one."""
        for client in clients:
            seat = self.seats[client]
            before = sorted(saved for saved in seat.saved_windows if saved < window)
            self.seats[client] = replace(seat, saved_windows=frozenset([*before[-1:], window]))

    def has_state(self, client: str, window: int) -> bool:
        """Whether a client has kept a state of its own of `window`."""
        return client in self.seats and window in self.seats[client].saved_windows


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
        """Where the run begins: 0, or a window that the server has saved.

        That is the newest one, or, where clients keep states of their own, the newest of those that
        most clients have: the others begin with the reference.
        """
        if not self.expectation.saved_windows:
            return 0
        kept = [self.expectation.own_states(hello) for hello, _ in self._waiting.values()]
        return max(self.expectation.saved_windows, key=lambda window: (sum(window in own for own in kept), window))

    @property
    def shard_sizes(self) -> dict[str, int]:
        """Characters of each client's text."""
        return {client: hello.shard_characters for client, (hello, _) in self._waiting.items()}

    def seats(self, world_size: int, window: WindowSection, participants: int | None = None) -> dict[str, Seat]:
        """A rank, a session and a share of the window for each client; `participants` of them take
        part at a time, or all.

        Ranks and shares depend on names and text sizes alone.
        """
        shares = window_shares(self.shard_sizes, window.tokens, window.share, participants, window.largest_share)
        ranks = assign_clients(shares, world_size)
        return {
            client: Seat(ranks[client], new_session(), shares[client], self._own_states(hello))
            for client, (hello, _) in sorted(self._waiting.items())
        }

    def welcome(self, client: str, welcome: pb.Welcome) -> None:
        """Answer a client's Join."""
        reply(self._waiting[client][1], welcome)

    def refuse_all(self, error: WireError) -> None:
        """Answer every waiting client with an error: the run does not start."""
        for _, answer in self._waiting.values():
            reply(answer, error)

    def _check(self, hello: pb.Hello) -> None:
        check_hello(hello, self.expectation)
        who = f"client {hello.client}"
        if hello.client in self._waiting:
            raise WireError(f"{who} has joined already; give each client its own --id")
        if self.is_complete:
            raise WireError(f"{who}: all {self.expected} clients have joined; raise clients.expected")

    def _own_states(self, hello: pb.Hello) -> frozenset[int]:
        """As the expectation says; a run that starts has none."""
        return self.expectation.own_states(hello) if self.expectation.saved_windows is not None else frozenset()


def check_peer(hello: pb.Hello) -> None:
    """WireError, with what the client should change, for a Hello that no run takes."""
    if not hello.client:
        raise WireError("a client without a name; give it one with --id")
    if not is_name(hello.client):
        raise WireError(f"a client's name is up to {LONGEST_NAME} letters, digits and .-_@+; give it another --id")
    if hello.protocol != PROTOCOL:
        raise WireError(
            f"client {hello.client} speaks protocol {hello.protocol}, this server {PROTOCOL}; install the same "
            "fedbert-ds on both"
        )


def check_hello(hello: pb.Hello, expectation: Expectation) -> None:
    """WireError, with what the client should change, for a Hello that does not fit the run."""
    check_peer(hello)
    who = f"client {hello.client}"
    if hello.task != expectation.task:
        raise WireError(
            f"{who} reads its files for {hello.task[:80] or 'no task'}, the run learns {expectation.task}; start it "
            f"with --task {expectation.task} and files of that kind"
        )
    if hello.vocabulary_hash and hello.vocabulary_hash != expectation.vocabulary_hash:
        raise WireError(f"{who} has another vocabulary than the run; drop --tokenizer or name the run's")
    if hello.shape_hash and hello.shape_hash != expectation.shape_hash:
        raise WireError(f"{who} has another model than the run; drop --model or name the run's")
    if hello.cut and hello.cut != expectation.cut:
        raise WireError(f"{who} insists on cut {hello.cut[:80]}, the run has {expectation.cut}; drop --cut")
    if hello.saved_windows and hello.run != expectation.run and expectation.clients_save:
        raise WireError(f"{who} has states of another run; give it another --state folder, or remove that one")
    if hello.shard_characters == 0:
        raise WireError(f"{who} has no text; check its --data")
    if hello.shard_characters > MOST_CHARACTERS:
        raise WireError(
            f"{who} says it has {hello.shard_characters:.1e} characters of text; at most {MOST_CHARACTERS:.0e} are sane"
        )


def fill(
    joins: Joins,
    next_event: Callable[[float], Event | None],
    join_timeout: float,
    stop: StopFlag,
    watch: Callable[[], None],
    answers_visitor: Callable[[JoinAsked], bool],
) -> None:
    """Take joins until every expected client has joined. `answers_visitor` answers those that are
    none, and says so.

    `watch` runs while waiting; it raises for a local client process that died. After `join_timeout`
    seconds or a stop request, raises RunError with the names of the clients that joined, and sends
    them the same error.
    """
    deadline, refusals = time.monotonic() + join_timeout, Refusals()
    while not joins.is_complete:
        match next_event(POLL_SECONDS):
            case JoinAsked() as asked if answers_visitor(asked):
                pass
            case JoinAsked(hello, answer):
                try:
                    joins.admit(hello, answer)
                except WireError as refusal:
                    refusals.add(str(refusal))
            case JoinAbandoned(hello):
                joins.withdraw(hello)
        watch()
        if stop.requested or time.monotonic() > deadline:
            here = ", ".join(joins.clients) or "none"
            reason = "stopped" if stop.requested else f"{join_timeout:.0f} s are over (clients.join_timeout)"
            error = RunError(f"{reason} before all {joins.expected} clients joined; here: {here}")
            joins.refuse_all(WireError(str(error)))
            raise error


def start_of(joins: Joins, world_size: int, window: WindowSection, participants: int | None = None) -> Start:
    """The first window and every client's seat, where `participants` of them, or all, take part at
    a time.
    """
    first_window = joins.first_window()
    is_saved = first_window in (joins.expectation.saved_windows or ())
    return Start(joins.seats(world_size, window, participants), first_window, is_saved)


@dataclass(frozen=True)
class Invitation:
    """What every client of a run is told when it is let in."""

    config: RunConfig
    endpoints: Sequence[str]
    """Address of each rank."""
    tokenizer: bytes
    model_config: str
    """Hugging Face's JSON."""
    run: str = ""
    """The run's id."""
    local_endpoints: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By local client: the address of each rank, as this machine reaches it."""

    def to_visitor(self) -> pb.Welcome:
        """The answer to who asks what a run is like: no session, the tokens of all clients."""
        return self.to("", Seat(0, session="", tokens=self.config.window.tokens, aggregator_session=""))

    def to(self, client: str, seat: Seat) -> pb.Welcome:
        """The answer to the Join of a client with this seat."""
        config = self.config
        settings = client_settings(
            config.run,
            config.data,
            config.optimizer,
            config.federation,
            config.wire,
            seat.tokens,
            config.window.tokens_per_micro_batch,
        )
        welcome = pb.Welcome(
            endpoint=self.local_endpoints.get(client, self.endpoints)[seat.rank],
            session=seat.session,
            model_config=self.model_config,
            cut=cut_to_json(config.cut),
            settings=settings.model_dump_json(),
            tokenizer=self.tokenizer,
            reconnect_timeout=config.clients.reconnect_timeout,
            run=self.run,
            held_out=config.data.client_held_out,
            evaluate_tokens=config.run.evaluate_tokens if config.run.evaluate_every else 0,
        )
        if config.aggregator is not None:
            welcome.aggregator, welcome.aggregator_session = config.aggregator.address, seat.aggregator_session
        return welcome


def answer_visitor(invitation: Invitation, asked: JoinAsked) -> bool:
    """Tell who only asks what the run is like; False for a client that joins."""
    if not asked.hello.inspect:
        return False
    try:
        check_peer(asked.hello)
        reply(asked.answer, invitation.to_visitor())
    except WireError as error:
        reply(asked.answer, error)
    return True
