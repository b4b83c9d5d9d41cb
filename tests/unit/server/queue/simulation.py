"""A federation without tensors, network or threads: queues of several ranks, their clients and their collectives.

`Federation` plays both the ranks' loop and the clients. Which of the possible things happens next is up to a
`choose` function, so any order of arrivals can be played. What must hold is kept here a second time, by plain
bookkeeping, and compared with every decision of the queues.
"""

from __future__ import annotations

import math
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from fedbert_ds.errors import WireError
from fedbert_ds.server.queue.deadlines import AnswerTimes, Deadlines
from fedbert_ds.server.queue.decisions import Backward, Decision, Expire, Forward, Open, Plan, Step, Suspend
from fedbert_ds.server.queue.in_flight import InFlightLimits
from fedbert_ds.server.queue.packing import MicroBatch, Piece, pack
from fedbert_ds.server.queue.pipeline_queue import PipelineQueue
from fedbert_ds.wire.messages import Manifest

Choose = Callable[[Sequence[Any]], Any]
Lengths = Callable[[str, int], tuple[tuple[int, ...], tuple[int, ...]]]
"""(client, window) -> tokens and masked tokens of its sequences."""

MANIFEST = ("manifest", 0)


class FixedAnswerTimes(AnswerTimes):
    """The same deadline for everybody."""

    def learn(self, client: str, kind: str, seconds: float) -> None:
        assert 0.0 <= seconds < math.inf

    def deadline(self, client: str) -> float:
        return self.floor


@dataclass(eq=False)
class Client:
    """One connection: a name that comes back is another Client."""

    name: str
    mute: str | None = None
    """`activations` or `gradient`: what it never sends."""
    next_manifest: int | None = None
    """The window whose manifest it may send now."""
    announced: Manifest | None = None
    """A manifest of a window that is not planned yet."""
    owed: dict[tuple[str, int], float] = field(default_factory=dict)
    """What it was asked for and has not sent, with the time its clock began; infinite while its window does not run."""
    is_benched: bool = False
    is_behind: bool = False
    """A window was planned without it."""
    last_answer: float = -math.inf
    """When activations or a gradient of it were last looked at."""
    skips: int = 0
    has_answered: bool = False
    """An answer has come since the last decision."""
    late: list[tuple[str, int]] = field(default_factory=list)
    """Answers it was asked for before it was skipped, which it may still send."""


@dataclass
class InFlight:
    """What became of one micro-batch of a rank's plan."""

    plan: MicroBatch
    dropped: set[str] = field(default_factory=set)
    opened: bool = False
    forwarded: tuple[Piece, ...] | None = None
    backwarded: tuple[Piece, ...] | None = None
    activations: set[str] = field(default_factory=set)
    gradients: set[str] = field(default_factory=set)
    """Clients whose gradient arrived while they were waited for."""

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Pieces that still count."""
        return tuple(piece for piece in self.plan.pieces if piece.client not in self.dropped)

    @property
    def holds_place(self) -> bool:
        """Its activations are waited for, here, or in a graph."""
        return self.opened and self.backwarded is None and bool(self.forwarded or self.pieces)

    def waits_for(self, client: str) -> bool:
        return self.backwarded is None and any(piece.client == client for piece in self.pieces)


@dataclass
class Window:
    """A planned window of a rank."""

    number: int
    micro_batches: dict[int, InFlight]
    members: dict[str, tuple[Client, int]]
    """Clients with a manifest in it, and how often each had been skipped before."""
    decisions: list[Decision] = field(default_factory=list)
    """Forward, Backward and Step."""
    masked: int = 0
    """Masked tokens of clients that were there when it started."""


class Rank:
    """One rank's queue, and what is known of it from outside."""

    def __init__(self, queue: PipelineQueue) -> None:
        self.queue = queue
        self.clients: dict[str, Client] = {}
        self.windows: deque[Window] = deque()
        self.next_window = 0
        self.next_index = 0
        self.is_running = self.is_alone = False
        self.last_members: set[str] = set()
        """Clients in the last window that was planned."""
        self.computed: list[list[Decision]] = []
        """Forward, Backward and Step of finished windows."""
        self.lost_masked_tokens: list[int] = []
        self.collectives: list[str] = []
        """Kinds of operations in which all ranks must take part, as this rank issued them."""
        self.is_blocked = False

    @property
    def entries(self) -> Iterator[tuple[Window, InFlight]]:
        return ((window, entry) for window in self.windows for entry in window.micro_batches.values())

    def entry(self, index: int) -> tuple[Window, InFlight]:
        return next((window, entry) for window, entry in self.entries if entry.plan.index == index)

    def burden_of(self, client: str) -> int:
        """Answers a client owes, and activations of it that no forward has taken yet; nothing if it owes nothing."""
        owed = sum(what != MANIFEST for what in self.clients[client].owed)
        lying = sum(
            entry.forwarded is None
            and entry.waits_for(client)
            and {p.client for p in entry.pieces} <= entry.activations
            for _, entry in self.entries
        )
        return owed + lying if owed else 0


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
        deadlines: float = math.inf,
        windows_ahead: int = 1,
        staleness: int = 0,
        is_synchronous: bool = True,
        num_windows: float = math.inf,
    ) -> None:
        self.depth = depth
        self.order = order
        self.capacity = capacity
        self.timeout = timeout
        self.deadlines = deadlines
        self.windows_ahead = windows_ahead
        self.staleness = staleness
        self.is_synchronous = is_synchronous
        self.num_windows = num_windows
        self.lengths = lengths
        self.now = 0.0
        self.ranks = [
            Rank(
                PipelineQueue(
                    depth,
                    partial(pack, capacity=capacity),
                    order,
                    lockstep_forwards,
                    num_windows=num_windows,
                    windows_ahead=windows_ahead,
                    deadlines=Deadlines(timeout, FixedAnswerTimes(deadlines) if deadlines < math.inf else None),
                )
            )
            for _ in range(num_ranks)
        ]
        self.collective_kinds = {"Gather", "Backward", "Step"}
        if lockstep_forwards or order == "fixed":
            self.collective_kinds.add("Forward")
        self.finished = 0
        self.expired: list[str] = []
        self.skipped: list[str] = []

    # -- what a client does ---------------------------------------------------------------------------------------

    def join(self, rank: int, name: str, mute: str | None = None) -> None:
        here = self.ranks[rank]
        here.queue.join(name, self.now)
        client = here.clients[name] = Client(name, mute)
        if here.next_window < self.num_windows:
            client.next_manifest = here.next_window
            client.owed[MANIFEST] = self.now

    def lose(self, rank: int, name: str) -> None:
        self.ranks[rank].queue.lose(name)
        self._forget(self.ranks[rank], name)

    def send_manifest(self, rank: int, name: str) -> None:
        here = self.ranks[rank]
        client = here.clients[name]
        window, client.next_manifest = client.next_manifest, None
        assert window is not None
        self._hear(here, client)
        manifest = Manifest(name, window, *self.lengths(name, window))
        is_taken = here.queue.manifest(manifest)
        assert is_taken == (window == here.next_window), "only what comes too late is not taken"
        if is_taken:
            client.announced = manifest
            client.is_behind = False
            client.owed.pop(MANIFEST, None)
        else:
            assert client.is_behind and window < here.next_window
            client.next_manifest = self._after(here)

    def send(self, rank: int, name: str, kind: Literal["activations", "gradient"], index: int) -> None:
        here = self.ranks[rank]
        self._hear(here, here.clients[name])
        _, entry = here.entry(index)
        expected = next(piece for piece in entry.plan.pieces if piece.client == name)
        assert not here.queue.was_skipped(name, index)
        assert here.queue.expected_piece(name, index, kind) == expected
        report = here.queue.activations if kind == "activations" else here.queue.gradient
        assert report(name, index) == expected
        del here.clients[name].owed[kind, index]
        here.clients[name].has_answered = True
        (entry.activations if kind == "activations" else entry.gradients).add(name)

    def send_late(self, rank: int, name: str) -> None:
        """What comes of a skipped piece is not wanted any more, but shows that the client is there."""
        here = self.ranks[rank]
        _, index = here.clients[name].late.pop(0)
        self._hear(here, here.clients[name])
        assert here.queue.was_skipped(name, index)

    def _hear(self, rank: Rank, client: Client) -> None:
        rank.queue.reactivate(client.name, self.now)
        if client.is_benched:
            client.is_benched = False
            client.owed.pop(MANIFEST, None)
            if client.announced is None and rank.next_window < self.num_windows:
                client.owed[MANIFEST] = self.now
        assert rank.queue.active == {other.name for other in rank.clients.values() if not other.is_benched}

    def _may_send(self, rank: Rank, client: Client, kind: str, index: int) -> bool:
        """Activations wait until the client's half has taken the steps of earlier windows."""
        if client.mute == kind:
            return False
        if kind == "gradient":
            return True
        before = rank.entry(index)[0].number - self.staleness
        if self.is_synchronous:
            return self.finished >= before
        return not any(window.number < before and entry.waits_for(client.name) for window, entry in rank.entries)

    # -- what ranks do --------------------------------------------------------------------------------------------

    def gather(self, rank: int) -> None:
        """This rank's next window is planned, and it tells the others; all of them start it together."""
        here = self.ranks[rank]
        assert here.queue.schedule.is_planned and not here.is_running
        here.collectives.append("Gather")
        here.is_blocked = True
        self._complete_collectives()

    def _start(self) -> None:
        counts = [rank.queue.schedule.num_micro_batches for rank in self.ranks]
        longest = max(1, *counts)
        for number, rank in enumerate(self.ranks):
            rank.is_alone = not any(counts[:number] + counts[number + 1 :])
            window = rank.windows[0]
            assert rank.queue.schedule.num_micro_batches == len(window.micro_batches)
            window.masked = sum(piece.masked for entry in window.micro_batches.values() for piece in entry.pieces)
            assert rank.queue.schedule.masked_tokens == window.masked
            for _ in range(longest - len(window.micro_batches)):
                window.micro_batches[rank.next_index] = InFlight(MicroBatch(rank.next_index, ()))
                rank.next_index += 1
            assert rank.queue.start(longest, self.now, InFlightLimits(self.depth, self.depth), rank.is_alone) == tuple(
                window.micro_batches
            )
            rank.is_running = True
            for client in rank.clients.values():
                for (kind, index), since in client.owed.items():
                    if since == math.inf and index in window.micro_batches:
                        client.owed[kind, index] = self.now

    def decide(self, rank: int) -> Decision | None:
        """One decision of a rank, compared with what may be decided."""
        here = self.ranks[rank]
        assert not here.is_blocked
        for client in here.clients.values():
            if client.has_answered:
                client.last_answer, client.has_answered = self.now, False
        decision = here.queue.decide(self.now)
        if isinstance(decision, Expire):
            waited = self.now - min(here.clients[decision.client].owed.values())
            assert waited > self.timeout, f"{decision.client} expired after {waited}"
            self.expired.append(decision.client)
            self._forget(here, decision.client)
            return decision
        if isinstance(decision, Suspend):
            self._skipped(here, decision)
            return decision
        late = [client.name for client in here.clients.values() if self._is_late(client)]
        assert not late, f"{late} should have been skipped or expired before {decision}"
        if decision is None:
            return None
        check = {
            Plan: self._planned,
            Open: self._opened,
            Forward: self._forwarded,
            Backward: self._backwarded,
            Step: self._stepped,
        }
        if isinstance(decision, Forward | Backward | Step):
            assert here.is_running, f"{decision} outside a window"
            here.windows[0].decisions.append(decision)
        check[type(decision)](here, decision)
        kind = type(decision).__name__
        if kind in self.collective_kinds:
            here.collectives.append(kind)
            here.is_blocked = True
            self._complete_collectives()
        return decision

    def _is_late(self, client: Client) -> bool:
        if client.owed and self.now - min(client.owed.values()) > self.timeout:
            return True
        return not client.is_benched and self.now - self._oldest_answer(client) > self.deadlines

    def _oldest_answer(self, client: Client) -> float:
        """Since when it has answered nothing of what it owes."""
        oldest = min((since for what, since in client.owed.items() if what != MANIFEST), default=math.inf)
        return max(oldest, client.last_answer)

    def _skipped(self, rank: Rank, decision: Suspend) -> None:
        client = rank.clients[decision.client]
        waited = self.now - self._oldest_answer(client)
        assert waited > self.deadlines and not client.is_benched, f"{client.name} skipped after {waited}"
        assert decision.skipped == tuple(
            (window.number, entry.plan.index) for window, entry in self._drop(rank, client.name)
        )
        client.is_benched = True
        client.skips += 1
        # A client whose half is not ready does not send what comes after a message that the piece is skipped.
        client.late += [what for what, since in client.owed.items() if what != MANIFEST and since < math.inf]
        client.owed = {MANIFEST: min(client.owed.values())}
        self.skipped.append(client.name)
        assert client.name not in rank.queue.active and client.name in rank.queue.clients

    def _planned(self, rank: Rank, decision: Plan) -> None:
        assert decision.window == rank.next_window < self.num_windows
        assert len(rank.windows) <= self.windows_ahead, "planned too far ahead"
        present = [client for client in rank.clients.values() if not client.is_benched]
        assert present or not rank.clients or not rank.is_alone, "a window that nobody would train in"
        manifests = {client.name: client.announced for client in present}
        assert None not in manifests.values(), "planned without a manifest of somebody who is there"
        assert {manifest.client: manifest for manifest in decision.manifests} == manifests
        told = {client.name for client in rank.clients.values() if client.announced is not None}
        assert decision.suspended == told - manifests.keys()
        packed = pack([manifest for manifest in manifests.values() if manifest], self.capacity)
        assert decision.micro_batches == tuple(
            MicroBatch(rank.next_index + number, pieces) for number, pieces in enumerate(packed)
        )
        rank.next_index += len(packed)
        rank.last_members = {client.name for client in present}
        rank.windows.append(
            Window(
                decision.window,
                {micro_batch.index: InFlight(micro_batch) for micro_batch in decision.micro_batches},
                {client.name: (client, client.skips) for client in present},
            )
        )
        rank.next_window += 1
        assert rank.queue.next_window == rank.next_window
        for client in rank.clients.values():
            client.is_behind |= client.is_benched
            if rank.next_window >= self.num_windows:
                client.owed.pop(MANIFEST, None)
            if client.name in told:
                client.announced = None
                client.next_manifest = self._after(rank)
                if rank.next_window < self.num_windows:
                    client.owed.setdefault(MANIFEST, self.now)

    def _after(self, rank: Rank) -> int | None:
        return rank.next_window if rank.next_window < self.num_windows else None

    def _opened(self, rank: Rank, decision: Open) -> None:
        window, entry = rank.entry(decision.micro_batch)
        assert not entry.opened
        assert decision.window == window.number
        assert decision.pieces == entry.pieces
        closed = [(other, e) for other, e in rank.entries if not e.opened]
        if self.order == "fixed":
            assert entry is closed[0][1], "credit is given in the order of the plan"
        elif entry.pieces:
            assert window is closed[0][0], "the running window needs all credit before the next gets any"
            waiting = {piece.client for other, e in closed if other is window for piece in e.pieces}
            fair = math.ceil(2 * self.depth / len(waiting))
            takes_too_much = [
                any(rank.burden_of(piece.client) >= fair for piece in other.pieces)
                for _, other in closed
                if other.pieces
            ]
            place = [other.plan.index for _, other in closed if other.pieces].index(entry.plan.index)
            assert takes_too_much[: place + 1] == [True] * place + [False], "in the order of the plan, but for greed"
        entry.opened = True
        assert sum(other.holds_place for _, other in rank.entries) <= 2 * self.depth
        is_due = rank.is_running and window is rank.windows[0]
        for piece in decision.pieces:
            rank.clients[piece.client].owed["activations", decision.micro_batch] = self.now if is_due else math.inf

    def _forwarded(self, rank: Rank, decision: Forward) -> None:
        window, entry = rank.entry(decision.micro_batch)
        assert window is rank.windows[0], "a forward before the step of the window before"
        assert entry.opened and entry.forwarded is None
        assert {piece.client for piece in entry.pieces} <= entry.activations, "forwarded before it was complete"
        assert decision.pieces == entry.pieces
        entry.forwarded = entry.pieces
        flying = [e for _, e in rank.entries if e.forwarded is not None and e.backwarded is None]
        assert len(flying) <= self.depth
        for piece in entry.pieces:
            rank.clients[piece.client].owed["gradient", decision.micro_batch] = self.now

    def _backwarded(self, rank: Rank, decision: Backward) -> None:
        window, entry = rank.entry(decision.micro_batch)
        assert entry.forwarded is not None and entry.backwarded is None
        for piece in entry.pieces:
            assert piece.client in entry.gradients, "backwarded before it was due"
        assert decision.pieces == entry.pieces
        entry.backwarded = decision.pieces
        assert decision.is_last == all(e.backwarded is not None for e in window.micro_batches.values())

    def _stepped(self, rank: Rank, decision: Step) -> None:
        window = rank.windows.popleft()
        assert decision.window == window.number
        assert all(entry.backwarded is not None for entry in window.micro_batches.values())
        kinds = [type(made) for made in window.decisions]
        assert kinds.count(Forward) == kinds.count(Backward) == len(window.micro_batches)
        assert [made.is_last for made in window.decisions if isinstance(made, Backward)].count(True) == 1
        done = [piece for entry in window.micro_batches.values() for piece in entry.backwarded or ()]
        assert decision.lost_masked_tokens == window.masked - sum(piece.masked for piece in done)
        rank.lost_masked_tokens.append(decision.lost_masked_tokens)
        rank.computed.append(window.decisions)
        self._check_survivors(rank, window)
        rank.is_running = False

    def _check_survivors(self, rank: Rank, window: Window) -> None:
        """Every sequence of a client that stayed, and was not skipped, was forwarded once and backwarded once."""
        for client, skips_before in window.members.values():
            if rank.clients.get(client.name) is not client or client.skips > skips_before:
                continue
            lengths, masked = self.lengths(client.name, window.number)
            for stage in ("forwarded", "backwarded"):
                done = [
                    piece
                    for entry in window.micro_batches.values()
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
        if issued[0] == "Gather":
            self._start()

    def _drop(self, rank: Rank, name: str) -> list[tuple[Window, InFlight]]:
        """Micro-batches that go on without this client from now on; a gradient that was here in time still counts."""
        dropped = [
            (window, entry)
            for window, entry in rank.entries
            if entry.waits_for(name) and not (entry.forwarded is not None and name in entry.gradients)
        ]
        for _, entry in dropped:
            entry.dropped.add(name)
        return dropped

    def _forget(self, rank: Rank, name: str) -> None:
        self._drop(rank, name)
        del rank.clients[name]

    # -- what may happen ------------------------------------------------------------------------------------------

    def possible(self) -> list[tuple[Any, ...]]:
        """Arrivals and steps of ranks; each is a method's name and its arguments."""
        actions: list[tuple[Any, ...]] = []
        for number, rank in enumerate(self.ranks):
            for client in rank.clients.values():
                if client.next_manifest is not None and not client.late:
                    actions.append(("send_manifest", number, client.name))
                actions += [
                    ("send", number, client.name, *what)
                    for what in client.owed
                    if what != MANIFEST and self._may_send(rank, client, *what)
                ]
                if client.late and client.late[0][0] != client.mute:
                    actions.append(("send_late", number, client.name))
            if rank.queue.schedule.is_planned and not rank.is_blocked:
                actions.append(("gather", number))
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
        jumps = 0
        while self.finished < windows:
            if self.decide_all():
                jumps = 0
            elif actions := self.possible():
                self.do(choose(actions))
            else:
                shortest = min(self.deadlines, self.timeout)
                assert shortest < math.inf and jumps < 10, "deadlock: nothing can happen and no rank can go on"
                self.now += shortest + 0.5
                jumps += 1

    # -- what must not happen -------------------------------------------------------------------------------------

    def violations(self) -> list[tuple[int, str, tuple[Any, ...]]]:
        """Calls that are against the protocol just now: rank, method of its queue, arguments."""
        calls: list[tuple[int, str, tuple[Any, ...]]] = []
        for number, rank in enumerate(self.ranks):
            expected = rank.next_window
            indices = [*(entry.plan.index for _, entry in rank.entries), 10**6]
            for client in rank.clients.values():
                calls.append((number, "join", (client.name, self.now)))
                wrong = [w for w in (expected - 1, expected + 1, 10**6) if w >= 0]
                if client.announced is not None:
                    wrong.append(expected)
                if client.is_behind:
                    wrong = [w for w in wrong if w >= expected]
                calls += [(number, "manifest", (Manifest(client.name, w, (1,), (0,)),)) for w in wrong]
                for kind in ("activations", "gradient"):
                    calls += [(number, kind, (client.name, i)) for i in indices if (kind, i) not in client.owed]
            calls.append((number, "manifest", (Manifest("nobody", expected, (1,), (0,)),)))
            for index in indices:
                calls += [(number, "activations", ("nobody", index)), (number, "gradient", ("nobody", index))]
        return calls

    def violate_all(self) -> None:
        """Each of these calls is refused with a WireError, and the queues are as they were."""
        before = [queue_state(rank.queue) for rank in self.ranks]
        for rank, method, arguments in self.violations():
            try:
                getattr(self.ranks[rank].queue, method)(*arguments)
            except WireError:
                continue
            raise AssertionError(f"{method}{arguments} was accepted")
        assert [queue_state(rank.queue) for rank in self.ranks] == before, "a call was refused, but changed a queue"


def queue_state(queue: PipelineQueue) -> bytes:
    """All that a queue holds, to be compared with itself later."""
    return pickle.dumps(queue)
