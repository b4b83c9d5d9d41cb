"""A federation without tensors, network or threads: queues of several ranks, their clients and their collectives.

`Federation` plays both the ranks' loop and the clients. Which of the possible things happens next is up to a
`choose` function, so any order of arrivals can be played. What must hold is kept here a second time, by plain
bookkeeping, and compared with every decision of the queues.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fedbert_ds.errors import WireError
from fedbert_ds.server.pipeline_queue import Backward, Decision, Expire, Forward, Open, PipelineQueue, Step
from fedbert_ds.server.window import MicroBatch, Piece, WindowPlan, plan_window
from fedbert_ds.wire.messages import Manifest

Choose = Callable[[Sequence[Any]], Any]
Lengths = Callable[[str, int], tuple[tuple[int, ...], tuple[int, ...]]]
"""(client, window) -> tokens and masked tokens of its sequences."""


@dataclass(eq=False)
class Client:
    """One connection: a name that comes back is another Client."""

    name: str
    is_mute: bool = False
    """Sends its manifest and never an answer."""
    announced: Manifest | None = None
    owed: dict[tuple[str, int], float] = field(default_factory=dict)
    """What it was asked for and has not sent, with the time it was asked."""


@dataclass
class InFlight:
    """What became of one micro-batch of a rank's plan."""

    plan: MicroBatch
    opened: bool = False
    forwarded: tuple[Piece, ...] | None = None
    backwarded: tuple[Piece, ...] | None = None
    activations: set[str] = field(default_factory=set)
    gradients: set[str] = field(default_factory=set)
    """Clients whose gradient arrived while they were connected."""


class Rank:
    """One rank's queue, and what is known of it from outside."""

    def __init__(self, queue: PipelineQueue) -> None:
        self.queue = queue
        self.clients: dict[str, Client] = {}
        self.members: dict[str, Client] = {}
        """Connected clients whose sequences are in the plan."""
        self.window = 0
        self.is_running = False
        self.micro_batches: dict[int, InFlight] = {}
        self.decisions: list[list[Decision]] = []
        """By window; without Expire."""
        self.lost_masked_tokens: list[int] = []
        self.collectives: list[str] = []
        """Kinds of operations in which all ranks must take part, as this rank issued them."""
        self.is_blocked = False

    def count(self, predicate: Callable[[InFlight], bool]) -> int:
        return sum(map(predicate, self.micro_batches.values()))


class Federation:
    """Ranks, clients, a clock; `possible` lists what may happen next and `do` makes one of these happen."""

    def __init__(
        self,
        *,
        num_ranks: int,
        depth: int,
        lengths: Lengths,
        capacity: int = 16,
        order: Literal["arrival", "fixed"] = "arrival",
        lockstep_forwards: bool = False,
        timeout: float = math.inf,
    ) -> None:
        self.depth = depth
        self.order = order
        self.capacity = capacity
        self.timeout = timeout
        self.lengths = lengths
        self.now = 0.0
        self.ranks = [
            Rank(PipelineQueue(depth, order, lockstep_forwards, silence_timeout=timeout)) for _ in range(num_ranks)
        ]
        self.collective_kinds = {"Backward", "Step"} | ({"Forward"} if lockstep_forwards or order == "fixed" else set())
        self.plan: WindowPlan | None = None
        self.to_start: set[int] = set()
        """Ranks that know the plan and have not started it."""
        self.finished = 0
        self.expired: list[str] = []

    # -- what a client does ---------------------------------------------------------------------------------------

    def join(self, rank: int, name: str, is_mute: bool = False) -> None:
        here = self.ranks[rank]
        here.queue.join(name, self.now)
        client = here.clients[name] = Client(name, is_mute)
        if not here.is_running:
            client.owed["manifest", 0] = self.now

    def lose(self, rank: int, name: str) -> None:
        self.ranks[rank].queue.lose(name)
        self._forget(self.ranks[rank], name)

    def send_manifest(self, rank: int, name: str) -> None:
        here = self.ranks[rank]
        window = here.window + here.is_running
        lengths, masked = self.lengths(name, window)
        manifest = Manifest(name, window, lengths, masked)
        here.queue.manifest(manifest)
        here.clients[name].announced = manifest
        here.clients[name].owed.pop(("manifest", 0), None)

    def send(self, rank: int, name: str, kind: Literal["activations", "gradient"], index: int) -> None:
        here = self.ranks[rank]
        expected = next(piece for piece in here.micro_batches[index].plan.pieces if piece.client == name)
        assert here.queue.expected_piece(name, index, kind) == expected
        report = here.queue.activations if kind == "activations" else here.queue.gradient
        assert report(name, index) == expected
        del here.clients[name].owed[kind, index]
        entry = here.micro_batches[index]
        (entry.activations if kind == "activations" else entry.gradients).add(name)

    # -- what ranks do --------------------------------------------------------------------------------------------

    def make_plan(self) -> None:
        """The exchange of manifests, in which all ranks take part."""
        assert all(rank.queue.gathered for rank in self.ranks)
        self.plan = plan_window(self.finished, [rank.queue.manifests for rank in self.ranks], self.capacity)
        for rank in self.ranks:
            rank.members = dict(rank.clients)
        self.to_start = set(range(len(self.ranks)))

    def start(self, rank: int) -> None:
        here = self.ranks[rank]
        assert self.plan is not None
        plan = self.plan.ranks[rank]
        here.queue.start(self.plan.window, plan)
        self.to_start.remove(rank)
        here.is_running = True
        for client in here.clients.values():
            client.owed.pop(("manifest", 0), None)
        here.micro_batches = {micro_batch.index: InFlight(micro_batch) for micro_batch in plan}
        here.decisions.append([])

    def decide(self, rank: int) -> Decision | None:
        """One decision of a rank, compared with what may be decided."""
        here = self.ranks[rank]
        assert not here.is_blocked
        decision = here.queue.decide(self.now)
        if isinstance(decision, Expire):
            waited = self.now - min(here.clients[decision.client].owed.values())
            assert waited > self.timeout, f"{decision.client} expired after {waited}"
            self.expired.append(decision.client)
            self._forget(here, decision.client)
            return decision
        overdue = [
            client.name
            for client in here.clients.values()
            if client.owed and self.now - min(client.owed.values()) > self.timeout
        ]
        assert not overdue, f"{overdue} should have expired before {decision}"
        if decision is None:
            return None
        here.decisions[-1].append(decision)
        check = {Open: self._opened, Forward: self._forwarded, Backward: self._backwarded, Step: self._stepped}
        check[type(decision)](here, decision)
        kind = type(decision).__name__
        if kind in self.collective_kinds:
            here.collectives.append(kind)
            here.is_blocked = True
            self._complete_collectives()
        return decision

    def _opened(self, rank: Rank, decision: Open) -> None:
        entry = rank.micro_batches[decision.micro_batch]
        assert not entry.opened
        closed = [other.plan for other in rank.micro_batches.values() if not other.opened]
        if self.order == "fixed":
            assert entry.plan is closed[0], "credit is given in the order of the plan"
        else:
            burdens = [self._burden(rank, plan) for plan in closed]
            assert entry.plan is closed[burdens.index(min(burdens))], "credit is given to those who owe least"
        assert decision.pieces == tuple(piece for piece in entry.plan.pieces if piece.client in rank.members)
        entry.opened = True
        assert rank.count(lambda e: e.opened and e.backwarded is None) <= 2 * self.depth
        for piece in decision.pieces:
            rank.members[piece.client].owed["activations", decision.micro_batch] = self.now

    def _burden(self, rank: Rank, plan: MicroBatch) -> tuple[bool, int]:
        owed = [len(rank.members[piece.client].owed) for piece in plan.pieces if piece.client in rank.members]
        return not plan.pieces, max(owed, default=0)

    def _forwarded(self, rank: Rank, decision: Forward) -> None:
        entry = rank.micro_batches[decision.micro_batch]
        assert entry.opened and entry.forwarded is None
        present = tuple(piece for piece in entry.plan.pieces if piece.client in rank.members)
        assert {piece.client for piece in present} <= entry.activations, "forwarded before it was complete"
        assert decision.pieces == present
        entry.forwarded = present
        assert rank.count(lambda e: e.forwarded is not None and e.backwarded is None) <= self.depth
        for piece in present:
            rank.members[piece.client].owed["gradient", decision.micro_batch] = self.now

    def _backwarded(self, rank: Rank, decision: Backward) -> None:
        entry = rank.micro_batches[decision.micro_batch]
        assert entry.forwarded is not None and entry.backwarded is None
        for piece in entry.forwarded:
            assert piece.client not in rank.members or piece.client in entry.gradients, "backwarded before it was due"
        assert decision.pieces == tuple(piece for piece in entry.forwarded if piece.client in entry.gradients)
        entry.backwarded = decision.pieces
        assert decision.is_last == all(e.backwarded is not None for e in rank.micro_batches.values())

    def _stepped(self, rank: Rank, decision: Step) -> None:
        assert decision.window == rank.window
        assert all(entry.backwarded is not None for entry in rank.micro_batches.values())
        kinds = [type(made) for made in rank.decisions[-1]]
        assert kinds.count(Forward) == kinds.count(Backward) == len(rank.micro_batches)
        assert [made.is_last for made in rank.decisions[-1] if isinstance(made, Backward)].count(True) == 1
        lost = sum(
            piece.masked
            for entry in rank.micro_batches.values()
            for piece in entry.plan.pieces
            if piece.client not in entry.gradients
        )
        assert decision.lost_masked_tokens == lost
        rank.lost_masked_tokens.append(lost)
        self._check_survivors(rank)
        rank.is_running = False
        rank.window += 1
        rank.micro_batches = {}
        rank.members = {}
        for client in rank.clients.values():
            if client.announced is None or client.announced.window != rank.window:
                client.owed["manifest", 0] = self.now

    def _check_survivors(self, rank: Rank) -> None:
        """Every sequence of a client that stayed was forwarded once and backwarded once."""
        for client in rank.members.values():
            lengths, masked = self.lengths(client.name, rank.window)
            for stage in ("forwarded", "backwarded"):
                done = [
                    piece
                    for entry in rank.micro_batches.values()
                    for piece in getattr(entry, stage)
                    if piece.client == client.name
                ]
                sequences = [
                    number
                    for piece in done
                    for number in range(piece.first_sequence, piece.first_sequence + piece.num_sequences)
                ]
                assert sorted(sequences) == list(range(len(lengths))), f"{client.name} {stage} {sequences}"
                assert sum(piece.tokens for piece in done) == sum(lengths)
                assert sum(piece.masked for piece in done) == sum(masked)

    def _complete_collectives(self) -> None:
        """An operation of all ranks ends when the last of them has issued it; all must have issued the same."""
        place = len(next(rank for rank in self.ranks if rank.is_blocked).collectives) - 1
        issued = [rank.collectives[place] for rank in self.ranks if len(rank.collectives) > place]
        assert len(set(issued)) == 1, f"operation {place} differs between ranks: {issued}"
        if len(issued) < len(self.ranks):
            return
        for rank in self.ranks:
            rank.is_blocked = False
        if issued[0] == "Step":
            self.finished += 1

    def _forget(self, rank: Rank, name: str) -> None:
        del rank.clients[name]
        rank.members.pop(name, None)

    # -- what may happen ------------------------------------------------------------------------------------------

    def possible(self) -> list[tuple[Any, ...]]:
        """Arrivals and steps of ranks; each is a method's name and its arguments."""
        actions: list[tuple[Any, ...]] = []
        for number, rank in enumerate(self.ranks):
            for client in rank.clients.values():
                expected = rank.window + rank.is_running
                is_due = client.announced is None or client.announced.window < expected
                if is_due and number not in self.to_start:
                    actions.append(("send_manifest", number, client.name))
                if not client.is_mute:
                    actions += [("send", number, client.name, *what) for what in client.owed if what != ("manifest", 0)]
        if self.to_start:
            actions += [("start", number) for number in sorted(self.to_start)]
        elif not any(rank.is_running for rank in self.ranks) and all(rank.queue.gathered for rank in self.ranks):
            actions.append(("make_plan",))
        return actions

    def do(self, action: tuple[Any, ...]) -> Any:
        return getattr(self, action[0])(*action[1:])

    def decide_all(self) -> bool:
        """Let ranks decide until all of them wait; says whether any decided anything."""
        decided = False
        while any([not rank.is_blocked and self.decide(number) for number, rank in enumerate(self.ranks)]):
            decided = True
        return decided

    def run(self, windows: int, choose: Choose = lambda options: options[0]) -> None:
        """Go on until so many windows are finished; an AssertionError when nothing can happen before that."""
        while self.finished < windows:
            if self.decide_all():
                continue
            if actions := self.possible():
                self.do(choose(actions))
                continue
            owing = any(client.owed for rank in self.ranks for client in rank.clients.values())
            assert owing and self.timeout < math.inf, "deadlock: nobody owes anything and no rank can go on"
            self.now += self.timeout + 1.0

    # -- what must not happen -------------------------------------------------------------------------------------

    def violations(self) -> list[tuple[int, str, tuple[Any, ...]]]:
        """Calls that are against the protocol just now: rank, method of its queue, arguments."""
        calls: list[tuple[int, str, tuple[Any, ...]]] = []
        for number, rank in enumerate(self.ranks):
            expected = rank.window + rank.is_running
            indices = [*rank.micro_batches, 10**6]
            for client in rank.clients.values():
                calls.append((number, "join", (client.name, self.now)))
                wrong = [w for w in (expected - 1, expected + 1, 10**6) if w >= 0]
                if client.announced is not None and client.announced.window == expected:
                    wrong.append(expected)
                calls += [(number, "manifest", (Manifest(client.name, w, (1,), (0,)),)) for w in wrong]
                for kind in ("activations", "gradient"):
                    calls += [(number, kind, (client.name, i)) for i in indices if (kind, i) not in client.owed]
            calls.append((number, "manifest", (Manifest("nobody", expected, (1,), (0,)),)))
            for index in indices:
                calls += [(number, "activations", ("nobody", index)), (number, "gradient", ("nobody", index))]
        return calls

    def violate_all(self) -> None:
        """Each of these calls is refused with a WireError, and the queue is as it was."""
        before = [copy.deepcopy(vars(rank.queue)) for rank in self.ranks]
        for rank, method, arguments in self.violations():
            queue = self.ranks[rank].queue
            try:
                getattr(queue, method)(*arguments)
            except WireError:
                pass
            else:
                raise AssertionError(f"{method}{arguments} was accepted")
            assert vars(queue) == before[rank], f"{method}{arguments} was refused, but changed the queue"
