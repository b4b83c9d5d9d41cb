"""Clients that join a run that is under way: new ones, and members that come back.

Rank 0 hears them and decides; every rank carries the decision out between two windows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from fedbert_ds.errors import WireError
from fedbert_ds.federation.strategy import Strategy
from fedbert_ds.server.admission import (
    Expectation,
    Invitation,
    Members,
    Seat,
    answer_visitor,
    check_hello,
    new_session,
)
from fedbert_ds.server.contract import RankStatus
from fedbert_ds.server.membership import Membership
from fedbert_ds.server.network.door import Refusals
from fedbert_ds.server.network.events import JoinAbandoned, JoinAsked, reply
from fedbert_ds.server.network.outbox import Outbox
from fedbert_ds.server.queue.seats import window_shares
from fedbert_ds.server.rank_group import RankGroup
from fedbert_ds.wire import fedbert_pb2 as pb

PATIENCE_SECONDS = 10.0
"""How long a join waits while another process is connected under its name: that one may be dead,
and the server may not have noticed."""


@dataclass(frozen=True)
class Admissions:
    """What rank 0 decided about the joins so far."""

    seats: Mapping[str, Seat]
    """Of those that are let in."""
    evicted: frozenset[str]
    """Members whose lost connection no longer keeps their place."""


@dataclass
class _Join:
    hello: pb.Hello
    answer: Future[pb.Welcome]
    asked: float
    """Seconds of a monotonic clock."""


class Reception:
    """The joins that rank 0 has heard and not answered.

    `shard_sizes` are characters of the members' texts.
    """

    def __init__(
        self,
        expectation: Expectation,
        invitation: Invitation,
        members: Members,
        shard_sizes: Mapping[str, int],
        strategy: Strategy,
    ) -> None:
        self._expectation = expectation
        self._shard_sizes = dict(shard_sizes)
        self._invitation = invitation
        self._members = members
        self._strategy = strategy
        self._joins: dict[str, _Join] = {}
        self._refusals = Refusals()
        self._awaited = dict.fromkeys(members.seats, time.monotonic())
        """When each client was let in that has not opened its stream since."""

    def hear(self, event: JoinAsked | JoinAbandoned) -> None:
        """Take a join in, or answer it with what is wrong with it; forget one that went away."""
        name = event.hello.client
        if isinstance(event, JoinAbandoned):
            if name in self._joins and self._joins[name].hello is event.hello:
                del self._joins[name]
            return
        if answer_visitor(self._invitation, event):
            return
        try:
            check_hello(event.hello, self._expectation)
            if name in self._joins:
                raise WireError(f"client {name} is joining already; give each client its own --id")
        except WireError as error:
            self._refusals.add(str(error))
            reply(event.answer, error)
            return
        self._joins[name] = _Join(event.hello, event.answer, time.monotonic())

    @property
    def is_asked(self) -> bool:
        """There are joins to decide about."""
        return bool(self._joins)

    @property
    def waiting(self) -> tuple[str, ...]:
        """Names of the clients that ask to join."""
        return tuple(self._joins)

    def decide(self, connected: frozenset[str], detached: frozenset[str], now: float) -> Admissions:
        """Who is let in, and whose place they take. The others wait, or are refused. A place that
        is kept for a client which has not opened its stream yet is no reason to refuse: they wait.

        `connected` are the clients of all ranks, `detached` those among them that have lost their
        connection.
        """
        seats: dict[str, Seat] = {}
        evicted = set()
        most = self._invitation.config.clients.most
        self.see(connected, now)
        for name, join in sorted(self._joins.items()):
            if name in detached:
                evicted.add(name)
            elif name in connected:
                if now - join.asked > PATIENCE_SECONDS:
                    self._refuse(name, f"client {name} is here already; end it, or give each client its own --id")
            elif name not in self._members.seats and len(connected | seats.keys()) >= most:
                self._refuse(name, f"client {name}: the run has its {most} clients; raise clients.maximum")
            elif name in self._members.seats or len(connected | self._awaited.keys()) < most:
                seats[name] = self._seat(join.hello)
                self._awaited[name] = now
        return Admissions(seats, frozenset(evicted))

    def welcome(self, admissions: Admissions) -> None:
        """Answer the joins that are let in."""
        for client, seat in admissions.seats.items():
            reply(self._joins.pop(client).answer, self._invitation.to(client, seat))

    def see(self, connected: frozenset[str], now: float) -> None:
        """These clients are here: their places no longer wait for them. Nor do those of clients
        that have not come for a while: somebody else may have them.
        """
        patience = self._invitation.config.clients.join_timeout
        for client, since in list(self._awaited.items()):
            if client in connected:
                del self._awaited[client]
            elif now - since > patience:
                del self._awaited[client]
                self._shard_sizes.pop(client, None)

    def _seat(self, hello: pb.Hello) -> Seat:
        """The seat a member had; for a new client one at the rank with the fewest tokens."""
        states = self._expectation.own_states(hello)
        before = self._members.seats.get(hello.client)
        if before is not None:
            return Seat(before.rank, new_session(), before.tokens, states)
        self._shard_sizes[hello.client] = hello.shard_characters
        window = self._invitation.config.window
        participants = self._strategy.num_participants(len(self._shard_sizes))
        shares = window_shares(self._shard_sizes, window.tokens, window.share, participants, window.largest_share)
        tokens = shares[hello.client]
        ranks = range(len(self._invitation.endpoints))
        loads = [sum(self._members.tokens[client] for client in self._members.at(rank)) for rank in ranks]
        return Seat(loads.index(min(loads)), new_session(), tokens, states)

    def _refuse(self, client: str, reason: str) -> None:
        self._refusals.add(reason)
        reply(self._joins.pop(client).answer, WireError(reason))


def no_joins_here(event: JoinAsked | JoinAbandoned) -> None:
    """What a rank other than 0 does with a join."""
    if isinstance(event, JoinAsked):
        reason = f"client {event.hello.client[:100]}: this rank takes no joins; dial the coordinator"
        reply(event.answer, WireError(reason))


class Newcomers:
    """Lets clients in between two windows. `reception` is rank 0's; the other ranks have none.

    `admit` and `admit_elsewhere` take sessions by client: those of this rank, and those that an
    aggregator of another party is to know.
    """

    def __init__(
        self,
        reception: Reception | None,
        members: Members,
        membership: Membership,
        outbox: Outbox,
        admit: Callable[[dict[str, str]], None],
        rank_group: RankGroup,
        admit_elsewhere: Callable[[dict[str, str]], None] = lambda _: None,
    ) -> None:
        self._reception = reception
        self._members = members
        self._membership = membership
        self._outbox = outbox
        self._admit = admit
        self._rank_group = rank_group
        self._admit_elsewhere = admit_elsewhere

    @property
    def is_asked(self) -> bool:
        """This rank has heard joins that are not answered."""
        return self._reception is not None and self._reception.is_asked

    def let_in(self, statuses: Sequence[RankStatus], window: int) -> None:
        """Decide about the joins so far and act on it. All ranks call it, with equal statuses.

        New clients count from `window` on, which no rank has planned yet.
        """
        connected = frozenset().union(*(status.clients for status in statuses))
        if self._reception is not None:
            self._reception.see(connected, time.monotonic())
        if not any(status.is_asked for status in statuses):
            return
        decided = None
        if self._reception is not None:
            detached = frozenset().union(*(status.detached for status in statuses))
            decided = self._reception.decide(connected, detached, time.monotonic())
        admissions = self._rank_group.broadcast(decided, Admissions)
        here = self._rank_group.rank
        self._members.admit(admissions.seats, window)
        for client in sorted(admissions.evicted & self._members.at(here)):
            self._membership.evict(client)
        mine = {client: seat for client, seat in admissions.seats.items() if seat.rank == here}
        if mine:
            # What is under way to a client's earlier process must not reach this one.
            self._outbox.settle()
        self._admit({client: seat.session for client, seat in mine.items()})
        if mine:
            self._admit_elsewhere({client: seat.aggregator_session for client, seat in mine.items()})
        # A client dials its rank as soon as it is welcomed.
        self._rank_group.barrier()
        if self._reception is not None:
            self._reception.welcome(admissions)
