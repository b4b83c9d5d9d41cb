"""What must hold of a rank's queue, kept a second time by plain bookkeeping and compared with each
decision.

The books know nothing of the queue's own: they hold what a rank and its clients can see from
outside.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from fedbert_ds.server.queue.decisions import Backward, Decision, Expire, Forward, Open, Plan, Step, Suspend
from fedbert_ds.server.queue.packing import MicroBatch, Piece, pack
from fedbert_ds.wire.messages import Manifest

Lengths = Callable[[str, int], tuple[tuple[int, ...], tuple[int, ...]]]
"""(client, window) -> tokens and masked tokens of its sequences."""
Kind = Literal["activations", "gradient"]

MANIFEST = ("manifest", 0)


def always(client: str, window: int) -> bool:
    return True


@dataclass(frozen=True)
class Rules:
    """What a queue was told to keep to."""

    in_flight: int
    """Micro-batches in flight; as many more may be buffered."""
    lengths: Lengths
    capacity: int = 16
    order: Literal["arrival", "fixed"] = "arrival"
    silence_timeout: float = math.inf
    deadline: float = math.inf
    """Every client's deadline for pieces."""
    windows_ahead: int = 1
    num_windows: float = math.inf
    takes_part: Callable[[str, int], bool] = always


@dataclass(eq=False)
class ClientBook:
    """One connection: a name that comes back has another book."""

    name: str
    may_announce: int | None = None
    """The window whose manifest it may send now."""
    announced: Manifest | None = None
    """A manifest of a window that is not planned yet."""
    owed: dict[tuple[str, int], float] = field(default_factory=dict)
    """What it was asked for and has not sent, with the time its clock began; infinite while its
    window does not run.
    """
    is_suspended: bool = False
    is_left_out: bool = False
    """A window was planned without it."""
    last_answer: float = -math.inf
    """When activations or a gradient of it were last looked at."""
    suspensions: int = 0
    has_answered: bool = False
    """An answer has come since the last decision."""
    skipped: list[tuple[str, int]] = field(default_factory=list)
    """Pieces it was asked for before it was suspended, in order: it may still send them, and nobody
    wants them.
    """

    @property
    def owed_pieces(self) -> dict[tuple[str, int], float]:
        return {what: since for what, since in self.owed.items() if what != MANIFEST}

    @property
    def silent_since(self) -> float:
        """Since when it has answered nothing of the pieces it owes."""
        return max(min(self.owed_pieces.values(), default=math.inf), self.last_answer)


class MicroBatchBook:
    """What became of one planned micro-batch."""

    def __init__(self, plan: MicroBatch) -> None:
        self.plan = plan
        self.left = {piece.client: piece for piece in plan.pieces}
        """Pieces that still count."""
        self.is_open = False
        self.forwarded: tuple[Piece, ...] | None = None
        self.backwarded: tuple[Piece, ...] | None = None
        self.activations: set[str] = set()
        self.gradients: set[str] = set()
        """Clients whose gradient arrived while they were waited for."""

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return tuple(self.left.values())

    @property
    def holds_place(self) -> bool:
        """Its activations are waited for, here, or in a graph."""
        return self.is_open and self.backwarded is None and bool(self.forwarded or self.left)

    @property
    def is_in_flight(self) -> bool:
        return self.forwarded is not None and self.backwarded is None

    def waits_for(self, client: str) -> bool:
        return self.backwarded is None and client in self.left


@dataclass
class WindowBook:
    """A planned window of a rank."""

    number: int
    micro_batches: dict[int, MicroBatchBook]
    members: dict[str, tuple[ClientBook, int]]
    """Clients with a manifest in it, and how often each had been suspended before."""
    decisions: list[Decision] = field(default_factory=list)
    """Forward, Backward and Step."""
    masked: int = 0
    """Masked tokens of clients that were there when it started."""


class Oracle:
    """The books of one rank. Events go in as they happen; `check` raises AssertionError for a wrong
    decision.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.clients: dict[str, ClientBook] = {}
        self.windows: deque[WindowBook] = deque()
        self.next_window = 0
        self.next_index = 0
        self.is_running = self.is_held = False
        self.elsewhere: frozenset[str] | None = None
        """Active clients of other ranks when the last window started."""
        self.last_members: set[str] = set()
        """Clients in the last window that was planned."""
        self.computed: list[list[Decision]] = []
        """Forward, Backward and Step of finished windows."""
        self.lost_masked_tokens: list[int] = []

    def wanted_manifest(self, name: str) -> int | None:
        """The client's next window among those that are to be planned."""
        window = self.next_window
        while window < self.rules.num_windows:
            if self.rules.takes_part(name, window):
                return window
            window += 1
        return None

    def is_next(self, name: str) -> bool:
        """The window that is to be planned next is one of the client's."""
        return self.wanted_manifest(name) == self.next_window

    @property
    def active(self) -> set[str]:
        return {client.name for client in self.clients.values() if not client.is_suspended}

    @property
    def micro_batches(self) -> Iterator[tuple[WindowBook, MicroBatchBook]]:
        return ((window, entry) for window in self.windows for entry in window.micro_batches.values())

    def find(self, index: int) -> tuple[WindowBook, MicroBatchBook]:
        window = next(window for window in self.windows if index in window.micro_batches)
        return window, window.micro_batches[index]

    # -- events ------------------------------------------------------------------------------------

    def join(self, name: str, now: float, is_awaited: bool = True) -> None:
        client = self.clients[name] = ClientBook(name, self.wanted_manifest(name), is_suspended=not is_awaited)
        if self.is_next(name):
            client.owed[MANIFEST] = now

    def lose(self, name: str) -> None:
        self._drop(name)
        del self.clients[name]

    def roll_back(self, window: int, now: float) -> None:
        """Whoever is here begins anew with this window; only indices go on."""
        self.windows.clear()
        self.next_window, self.is_running = window, False
        del self.computed[window:], self.lost_masked_tokens[window:]
        for client in self.clients.values():
            client.may_announce, client.announced = self.wanted_manifest(client.name), None
            client.owed = {MANIFEST: now} if self.is_next(client.name) else {}
            client.is_suspended = client.is_left_out = client.has_answered = False
            client.skipped.clear()

    def hear(self, name: str, now: float) -> None:
        """A message came, whichever: a suspended client is active again."""
        client = self.clients[name]
        if client.is_suspended:
            client.is_suspended = False
            client.owed.pop(MANIFEST, None)
            if client.announced is None and self.is_next(name):
                client.owed[MANIFEST] = now

    def announce(self, manifest: Manifest) -> bool:
        """Whether the manifest must be taken: what comes too late is not."""
        client = self.clients[manifest.client]
        client.may_announce = None
        if manifest.window != self.wanted_manifest(client.name):
            assert client.is_left_out and manifest.window < self.next_window
            client.may_announce = self.wanted_manifest(client.name)
            return False
        client.announced = manifest
        client.is_left_out = False
        client.owed.pop(MANIFEST, None)
        return True

    def answer(self, name: str, kind: Kind, index: int) -> Piece:
        """The piece that was asked for, and has come now."""
        _, entry = self.find(index)
        del self.clients[name].owed[kind, index]
        self.clients[name].has_answered = True
        (entry.activations if kind == "activations" else entry.gradients).add(name)
        return next(piece for piece in entry.plan.pieces if piece.client == name)

    def masked_tokens(self) -> int:
        """Of the window to start."""
        return sum(piece.masked for entry in self.windows[0].micro_batches.values() for piece in entry.pieces)

    def start(self, num_micro_batches: int, elsewhere: frozenset[str], now: float) -> tuple[int, ...]:
        """The micro-batches of the window that starts, dummies with them."""
        window = self.windows[0]
        window.masked = self.masked_tokens()
        for _ in range(num_micro_batches - len(window.micro_batches)):
            window.micro_batches[self.next_index] = MicroBatchBook(MicroBatch(self.next_index, ()))
            self.next_index += 1
        self.is_running, self.elsewhere = True, elsewhere
        for client in self.clients.values():
            for (kind, index), since in client.owed.items():
                if since == math.inf and index in window.micro_batches:
                    client.owed[kind, index] = now
        return tuple(window.micro_batches)

    # -- decisions ---------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """The queue is about to decide: answers that came before count from now."""
        for client in self.clients.values():
            if client.has_answered:
                client.last_answer, client.has_answered = now, False

    def check(self, decision: Decision | None, now: float) -> None:
        """Whether this may be decided now; it is done then."""
        match decision:
            case Expire():
                waited = now - min(self.clients[decision.client].owed.values())
                assert waited > self.rules.silence_timeout, f"{decision.client} expired after {waited}"
                self.lose(decision.client)
                return
            case Suspend():
                self._suspended(decision, now)
                return
        late = [client.name for client in self.clients.values() if self._is_late(client, now)]
        assert not late, f"{late} should have been suspended or expired before {decision}"
        if isinstance(decision, Forward | Backward | Step):
            assert self.is_running, f"{decision} outside a window"
            self.windows[0].decisions.append(decision)
        match decision:
            case Plan():
                self._planned(decision, now)
            case Open():
                self._opened(decision, now)
            case Forward():
                self._forwarded(decision, now)
            case Backward():
                self._backwarded(decision)
            case Step():
                self._stepped(decision)

    def _is_late(self, client: ClientBook, now: float) -> bool:
        if client.owed and now - min(client.owed.values()) > self.rules.silence_timeout:
            return True
        return not client.is_suspended and now - client.silent_since > self.rules.deadline

    def _suspended(self, decision: Suspend, now: float) -> None:
        client = self.clients[decision.client]
        waited = now - client.silent_since
        assert waited > self.rules.deadline and not client.is_suspended, f"{client.name} suspended after {waited}"
        dropped = self._drop(client.name)
        assert decision.skipped == tuple((window.number, entry.plan.index) for window, entry in dropped)
        client.is_suspended = True
        client.suspensions += 1
        # A client that is not ready for a piece does not send it after it heard that the piece is
        # skipped.
        client.skipped += [what for what, since in client.owed_pieces.items() if since < math.inf]
        # Of whom nothing is asked, no clock runs.
        is_asked = self.rules.takes_part(client.name, self.next_window)
        client.owed = {MANIFEST: min(client.owed.values())} if is_asked else {}

    def _planned(self, decision: Plan, now: float) -> None:
        assert decision.window == self.next_window < self.rules.num_windows
        assert len(self.windows) <= self.rules.windows_ahead, "planned too far ahead"
        assert not self.is_held, "planned while it was told to wait"
        participants = [client for client in self.clients.values() if self.is_next(client.name)]
        active = [client for client in participants if not client.is_suspended]
        others = None if self.elsewhere is None else [name for name in self.elsewhere if self.is_next(name)]
        assert active or not participants or others != [], "a window that nobody would train in"
        manifests = {client.name: client.announced for client in active}
        assert None not in manifests.values(), "planned without a manifest of somebody who is active"
        assert {manifest.client: manifest for manifest in decision.manifests} == manifests
        told = {client.name for client in participants if client.announced is not None}
        assert all(manifest.window == decision.window for manifest in decision.manifests)
        assert decision.suspended == told - manifests.keys()
        packed = pack([manifest for manifest in manifests.values() if manifest], self.rules.capacity)
        assert decision.micro_batches == tuple(
            MicroBatch(self.next_index + number, pieces) for number, pieces in enumerate(packed)
        )
        self.next_index += len(packed)
        self.last_members = set(manifests)
        micro_batches = {micro_batch.index: MicroBatchBook(micro_batch) for micro_batch in decision.micro_batches}
        members = {client.name: (client, client.suspensions) for client in active}
        self.windows.append(WindowBook(decision.window, micro_batches, members))
        self.next_window += 1
        for client in participants:
            client.is_left_out |= client.is_suspended
        for client in self.clients.values():
            if client.name in told:
                client.announced, client.may_announce = None, self.wanted_manifest(client.name)
            if self.next_window >= self.rules.num_windows:
                client.owed.pop(MANIFEST, None)
            elif self.is_next(client.name) and (client.announced is None or client.is_suspended):
                client.owed.setdefault(MANIFEST, now)

    def _opened(self, decision: Open, now: float) -> None:
        window, entry = self.find(decision.micro_batch)
        assert not entry.is_open
        assert decision.window == window.number
        assert decision.pieces == entry.pieces
        closed = [(other, each) for other, each in self.micro_batches if not each.is_open]
        if self.rules.order == "fixed":
            assert entry is closed[0][1], "credit is given in the order of the plan"
        elif entry.pieces:
            assert window is closed[0][0], "the running window needs all credit before the next gets any"
            waiting = {client for other, each in closed if other is window for client in each.left}
            fair = math.ceil(2 * self.rules.in_flight / len(waiting))
            burdens = self._burdens()
            takes_too_much = {
                each.plan.index: any(burdens[client] >= fair for client in each.left) for _, each in closed if each.left
            }
            place = list(takes_too_much).index(entry.plan.index)
            assert list(takes_too_much.values())[: place + 1] == [True] * place + [False], (
                "in the order of the plan, but for greed"
            )
        entry.is_open = True
        assert sum(other.holds_place for _, other in self.micro_batches) <= 2 * self.rules.in_flight
        is_due = self.is_running and window is self.windows[0]
        for piece in decision.pieces:
            self.clients[piece.client].owed["activations", decision.micro_batch] = now if is_due else math.inf

    def _burdens(self) -> dict[str, int]:
        """Pieces each client owes, and activations of it that no forward has taken yet; nothing if
        it owes nothing.
        """
        entries = [entry for _, entry in self.micro_batches if entry.forwarded is None]
        complete = [entry for entry in entries if entry.left.keys() <= entry.activations]
        lying = Counter(client for entry in complete for client in entry.left)
        owed = {name: len(client.owed_pieces) for name, client in self.clients.items()}
        return {name: count + lying[name] if count else 0 for name, count in owed.items()}

    def _forwarded(self, decision: Forward, now: float) -> None:
        window, entry = self.find(decision.micro_batch)
        assert window is self.windows[0], "a forward before the step of the window before"
        assert entry.is_open and entry.forwarded is None
        assert entry.left.keys() <= entry.activations, "forwarded before it was complete"
        assert decision.pieces == entry.pieces
        entry.forwarded = entry.pieces
        assert sum(other.is_in_flight for _, other in self.micro_batches) <= self.rules.in_flight
        for piece in entry.pieces:
            self.clients[piece.client].owed["gradient", decision.micro_batch] = now

    def _backwarded(self, decision: Backward) -> None:
        _, entry = self.find(decision.micro_batch)
        assert entry.is_in_flight
        assert entry.left.keys() <= entry.gradients, "backwarded before it was due"
        assert decision.pieces == entry.pieces
        entry.backwarded = decision.pieces

    def _stepped(self, decision: Step) -> None:
        window = self.windows.popleft()
        assert decision.window == window.number
        assert all(entry.backwarded is not None for entry in window.micro_batches.values())
        kinds = [type(made) for made in window.decisions]
        assert kinds.count(Forward) == kinds.count(Backward) == len(window.micro_batches)
        done = [piece for entry in window.micro_batches.values() for piece in entry.backwarded or ()]
        assert decision.lost_masked_tokens == window.masked - sum(piece.masked for piece in done)
        self.lost_masked_tokens.append(decision.lost_masked_tokens)
        self.computed.append(window.decisions)
        self._check_survivors(window)
        self.is_running = False

    def _check_survivors(self, window: WindowBook) -> None:
        """Every sequence of a client that stayed, and was not suspended, was forwarded once and
        backwarded once.
        """
        for client, suspensions_before in window.members.values():
            if self.clients.get(client.name) is not client or client.suspensions > suspensions_before:
                continue
            lengths, masked = self.rules.lengths(client.name, window.number)
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

    def _drop(self, name: str) -> list[tuple[WindowBook, MicroBatchBook]]:
        """Micro-batches that go on without this client from now on; a gradient that was here in
        time still counts.
        """
        dropped = [
            (window, entry)
            for window, entry in self.micro_batches
            if entry.waits_for(name) and not (entry.forwarded is not None and name in entry.gradients)
        ]
        for _, entry in dropped:
            del entry.left[name]
        return dropped
