"""The ranks and clients of one run at the aggregator: who is admitted, here, and whose rank's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from fedbert_ds.errors import WireError
from fedbert_ds.federation.client_update import ClientUpdate
from fedbert_ds.server.network.outbox import Sends
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.aggregation import rank_name
from fedbert_ds.wire.identity import is_name


class RunEndpoint(Sends, Protocol):
    """What a run needs of the endpoint."""

    def admit(self, sessions: dict[str, str]) -> None:
        """Let these ranks and clients open a stream, each with its session, and no others."""
        ...

    def report(self, rank: str, report: pb.Report) -> None:
        """Queue a message for a rank; messages to one that is gone are dropped."""
        ...

    def close_rank(self, rank: str, last: pb.Report) -> None:
        """Send one last message, then end the rank's stream; nothing more is heard of it."""
        ...


class Beginning(NamedTuple):
    """How a client begins."""

    attempt: int
    """Of the server's Begin."""
    own_state: int | None
    """The version of the reference that it has a state of; None if it begins with the reference."""


class Guests:
    """Admits ranks, one with each of `sessions`, and their clients."""

    def __init__(self, endpoint: RunEndpoint, sessions: Sequence[str]) -> None:
        self._endpoint = endpoint
        self._ranks = [rank_name(rank) for rank in range(len(sessions))]
        self._sessions = dict(zip(self._ranks, sessions, strict=True))
        self._rank_of: dict[str, int] = {}
        """Of every client that was admitted."""
        self._beginnings: dict[str, Beginning] = {}
        """Clients whose rank has let them begin, and that have not."""
        self.here: set[str] = set()
        """Clients that are admitted and not gone."""
        self.connected: set[str] = set()
        """Clients with an open stream."""
        self.under_way: set[str] = set()
        """Clients that have begun, which get every combined update."""
        endpoint.admit(dict(self._sessions))

    def rank(self, name: str) -> int | None:
        """A rank by its name at the endpoint; None if it is not one of this run."""
        return self._ranks.index(name) if name in self._ranks else None

    def admit(self, rank: int, admit: pb.Admit) -> None:
        """Admit clients of a rank, and tell it so. Raises WireError for an impossible name."""
        for admission in admit.clients:
            client = admission.client
            if not is_name(client) or not admission.session:
                raise WireError(f"rank {rank} admits a client without a name or a session")
            self._rank_of[client] = rank
            self._sessions[client] = admission.session
            self.here.add(client)
        self._endpoint.admit(dict(self._sessions))
        self.tell_rank(rank, pb.Report(admitted=pb.Admitted(window=admit.window)))

    def connect(self, client: str) -> None:
        """A client has opened its stream."""
        if client in self.here:
            self.connected.add(client)

    def let_begin(self, client: str, beginning: Beginning) -> None:
        """A client's rank lets it begin."""
        if client in self.here:
            self._beginnings[client] = beginning

    def take_beginnings(self) -> dict[str, Beginning]:
        """Clients that begin now, each with what `let_begin` said: both their streams are open."""
        now = {client: self._beginnings.pop(client) for client in sorted(self._beginnings.keys() & self.connected)}
        self.under_way |= now.keys()
        return now

    def part_with(self, client: str) -> None:
        """A client is gone, and may open no further stream."""
        self.here.discard(client)
        self.connected.discard(client)
        self.under_way.discard(client)
        self._beginnings.pop(client, None)
        self._sessions.pop(client, None)
        self._endpoint.admit(dict(self._sessions))

    def by_rank(self, updates: Mapping[str, ClientUpdate]) -> list[list[ClientUpdate]]:
        """Each rank's updates by name, so that a sum depends on nothing else."""
        ranks: list[list[ClientUpdate]] = [[] for _ in self._ranks]
        for client, update in sorted(updates.items()):
            ranks[self._rank_of[client]].append(update)
        return ranks

    def tell_rank(self, rank: int, report: pb.Report) -> None:
        """Tell one rank."""
        self._endpoint.report(self._ranks[rank], report)

    def tell_rank_of(self, client: str, report: pb.Report) -> None:
        """Tell the client's rank."""
        self.tell_rank(self._rank_of[client], report)

    def part_with_ranks(self, last: pb.Report) -> None:
        """Tell every rank one last thing, and hear nothing more of this run."""
        for rank in self._ranks:
            self._endpoint.close_rank(rank, last)

    def tell_combined(self, window: int, norm: float, bounded: Mapping[str, float]) -> None:
        """Tell every rank that a window is combined, and whose updates, of its own clients, were
        too large, by how many times.
        """
        for rank in range(len(self._ranks)):
            mine = {client: times for client, times in bounded.items() if self._rank_of[client] == rank}
            combined = pb.Combined(window=window, norm=norm, bounded=mine.keys(), times=mine.values())
            self.tell_rank(rank, pb.Report(combined=combined))

    def tell_all_ranks(self, report: pb.Report) -> None:
        """Tell every rank."""
        for rank in range(len(self._ranks)):
            self.tell_rank(rank, report)
