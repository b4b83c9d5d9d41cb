"""What a window's updates become together: each is bounded, then their mean, or a robust rule."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedbert_ds.config import FederationSection
from fedbert_ds.federation import robust
from fedbert_ds.federation.averaging import NobodyDelivered, combine_ranks
from fedbert_ds.federation.client_update import ClientUpdate
from fedbert_ds.federation.influence import Vote, most_of_changes, most_of_sums, shrinking

PIECE = 1 << 20
"""Numbers of each update that a robust rule has in memory at a time."""
MOST_REMEMBERED = 4096
"""Clients whose last vote is remembered."""

Shapes = Mapping[str, tuple[int, ...]]
Updates = Mapping[str, ClientUpdate]


class Sources(Protocol):
    """The updates of all ranks, of which the caller has its own rank's, by client.

    With several ranks all of them make the same calls.
    """

    def votes(self, mine: Mapping[str, Vote]) -> dict[str, Vote]:
        """The votes of all clients."""

    def mean(self, mine: Updates, shapes: Shapes, average: bool) -> dict[str, Tensor]:
        """The sum, or the average by weights, fp32. Raises NobodyDelivered for one of nothing."""

    def stacked(self, mine: Mapping[str, Tensor], clients: Sequence[str]) -> Tensor:
        """[N, n] of one piece [n] of the update of each of `clients`, which are all ranks'."""


class OneProcess:
    """Sources of a process that has every update, as an aggregator of another party.

    `by_rank` sorts updates by rank, whose sums are added up as ranks would.
    """

    def __init__(self, by_rank: Callable[[Updates], list[list[ClientUpdate]]]) -> None:
        self._by_rank = by_rank

    def votes(self, mine: Mapping[str, Vote]) -> dict[str, Vote]:
        """They are all here."""
        return dict(mine)

    def mean(self, mine: Updates, shapes: Shapes, average: bool) -> dict[str, Tensor]:
        """As `combine_ranks`."""
        return combine_ranks(self._by_rank(mine), shapes, average)

    def stacked(self, mine: Mapping[str, Tensor], clients: Sequence[str]) -> Tensor:
        """They are all here."""
        return torch.stack([mine[client] for client in clients])


class Combiner:
    """Combines one window after another, in order.

    No update counts for more than `federation.bound` times what is typical of the clients; with
    `norm_clipping` that is `federation.clipping_radius`. Where weights are sent, what counts is
    their change from `common()`, the weights before. It remembers each client's last vote, which
    belongs into a checkpoint.
    """

    def __init__(
        self,
        federation: FederationSection,
        shapes: Shapes,
        sources: Sources,
        common: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        self._rule = federation.combine
        self._liars = federation.assumed_liars
        self._times = federation.clipping_radius if self._rule == "norm_clipping" else federation.bound
        self.shapes = shapes
        """Of what is exchanged."""
        self._sources, self._common = sources, common
        self._last: dict[str, Vote] = {}
        self._bounded: list[tuple[str, float]] = []
        self._lock = threading.Lock()

    def combine(self, updates: Updates, average: bool) -> dict[str, Tensor]:
        """The sum of all ranks' gradients, or the average of their weights or changes, fp32 by
        name, or what a robust rule makes of them. Raises NobodyDelivered for an average of nothing.
        """
        votes, bounded = self._bound(updates, self.shapes, average, self._common() if average else {}, self._last)
        for client, vote in sorted(votes.items()):
            self._last.pop(client, None)
            self._last[client] = vote
        while len(self._last) > MOST_REMEMBERED:
            del self._last[next(iter(self._last))]
        return self._together(votes, bounded, self.shapes, average)

    def result(self, halves: Updates, shapes: Shapes, common: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What clients' whole halves of these shapes become together, at the end of a run.

        Bounded by their change from `common`: what is exchanged and what is personal apart. Raises
        NobodyDelivered if no rank has one.
        """
        result: dict[str, Tensor] = {}
        personal = {name: shape for name, shape in shapes.items() if name not in self.shapes}
        for part in (self.shapes, personal):
            names = {name: shapes[name] for name in part if name in shapes}
            if names:
                votes, bounded = self._bound(halves, names, True, common, {})
                result |= self._together(votes, bounded, names, True)
        return {name: result[name] for name in shapes}

    def take_bounded(self) -> list[tuple[str, float]]:
        """Clients of this rank whose update was bounded since the last call, and how many times
        what may count it was.
        """
        with self._lock:
            bounded, self._bounded = self._bounded, []
        return bounded

    def state(self) -> dict[str, tuple[float, float]]:
        """Each client's last vote, for a checkpoint."""
        return {client: (vote.norm, vote.masked) for client, vote in self._last.items()}

    def load_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from `state`."""
        self._last = {client: Vote(*map(float, vote)) for client, vote in state.items()}

    def _bound(
        self, updates: Updates, shapes: Shapes, average: bool, common: Mapping[str, Tensor], others: Mapping[str, Vote]
    ) -> tuple[dict[str, Vote], Updates]:
        """(votes of all ranks' clients, this rank's updates, none too large)."""
        mine = {client: Vote(_norm(update, shapes, common), update.weight) for client, update in updates.items()}
        votes = self._sources.votes(mine)
        if self._times is None:
            return votes, updates
        most = (most_of_changes if average else most_of_sums)(votes, others, self._times)
        bounded = {}
        for client, update in updates.items():
            factor = shrinking(mine[client].norm, most[client])
            bounded[client] = update if factor == 1.0 else _shrunk(update, shapes, common, factor)
            # A rule that clips at the typical size clips every second honest update.
            if factor < 1.0 and self._rule != "norm_clipping":
                with self._lock:
                    self._bounded.append((client, 1.0 / factor if factor else math.inf))
        return votes, bounded

    def _together(
        self, votes: Mapping[str, Vote], updates: Updates, shapes: Shapes, average: bool
    ) -> dict[str, Tensor]:
        if self._rule in ("mean", "norm_clipping"):
            return self._sources.mean(updates, shapes, average)
        if average and not votes:
            raise NobodyDelivered
        # Without a masked token there is nothing behind an update, and all without any count alike.
        clients = [client for client in sorted(votes) if votes[client].masked > 0] or sorted(votes)
        if not clients:
            return {name: torch.zeros(shape) for name, shape in shapes.items()}
        # A sum of gradients is their mean for each token, times the tokens.
        shares = {client: 1.0 if average else max(1.0, votes[client].masked) for client in clients}
        times = 1.0 if average else sum(shares.values())
        mine = {client: update for client, update in updates.items() if client in shares}

        def stacks(name: str) -> Iterator[Tensor]:
            size = math.prod(shapes[name])
            for start in range(0, size, PIECE):
                piece = {
                    client: update.tensors[name].reshape(-1)[start : start + PIECE] / shares[client]
                    for client, update in mine.items()
                }
                yield self._sources.stacked(piece, clients)

        rule = self._rule_for(shapes, stacks, len(clients))
        combined = {}
        for name, shape in shapes.items():
            pieces = [rule(stack) * times for stack in stacks(name)]
            combined[name] = torch.cat(pieces).to(torch.float32).reshape(shape) if pieces else torch.zeros(shape)
        return combined

    def _rule_for(
        self, shapes: Shapes, stacks: Callable[[str], Iterator[Tensor]], count: int
    ) -> Callable[[Tensor], Tensor]:
        """The rule as a function of a stack [N, n]."""
        if self._rule == "median":
            return robust.median
        if self._rule == "trimmed_mean":
            return lambda stack: robust.trimmed_mean(stack, self._liars)
        distances = torch.zeros(count, count, dtype=torch.float64)
        for name in shapes:
            for stack in stacks(name):
                distances += robust.squared_distances(stack)
        rows = robust.krum(distances, self._liars)
        return lambda stack: robust.mean_of(stack, rows)


def _norm(update: ClientUpdate, shapes: Shapes, common: Mapping[str, Tensor]) -> float:
    """Of an update, or of its change from `common`, over the tensors in `shapes`."""
    norms = []
    for name in shapes:
        tensor = update.tensors[name]
        change = tensor - common[name] if name in common else tensor
        norms.append(float(torch.linalg.vector_norm(change, dtype=torch.float64)))
    return math.hypot(*norms)


def _shrunk(update: ClientUpdate, shapes: Shapes, common: Mapping[str, Tensor], factor: float) -> ClientUpdate:
    tensors = {}
    for name in shapes:
        tensor = update.tensors[name]
        tensors[name] = common[name] + (tensor - common[name]) * factor if name in common else tensor * factor
    return ClientUpdate(tensors, update.weight)
