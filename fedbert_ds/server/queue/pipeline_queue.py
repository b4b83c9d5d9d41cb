"""The pipeline queue of one rank: events in, decisions out.

It knows nothing of tensors, networks, threads or the wall clock: the caller reports what arrived (manifest,
activations, gradient, lost client, time) and carries out what `decide` returns (plan, open, forward, backward, skip,
expire, step). A micro-batch goes

    PLANNED -> OPEN -> READY -> FORWARDED -> GRADIENTS_READY -> DONE

where OPEN is the credit its clients wait for, READY means all activations are here, and GRADIENTS_READY all gradients.

The body never waits for what could have been asked before: while one window runs the next is planned, from manifests
that clients send ahead, and gets credit as soon as the running one needs none. Its clients send as soon as their own
half is done with the running window. Only forwards wait for the step.

Forwards go before backwards while there is room: the gradients that are back then make a stock of work, which covers
the round trip after a window's last forward.

Every decision takes time that depends on the micro-batches in flight, not on how many clients there are or how much a
window holds: one rank serves thousands.

Bounds: at most `micro_batches_in_flight` are FORWARDED or GRADIENTS_READY (graphs the body holds), at most
`micro_batches_ahead` more are past PLANNED (activations buffered beside them), but for dummies, which hold nothing.

Lockstep: each rank emits as many forwards and backwards a window as the longest plan has micro-batches, whoever is
lost. With `lockstep_forwards` (ZeRO stage 3, whose forwards gather parameters too) the sequence of kinds is one fixed
pattern, agreed without a message.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

from fedbert_ds.errors import WireError
from fedbert_ds.server.queue.deadlines import Deadlines
from fedbert_ds.server.queue.decisions import Backward, Decision, Expire, Forward, Open, Plan, Skip, Step
from fedbert_ds.server.queue.packing import MicroBatch, Piece
from fedbert_ds.wire.messages import Manifest

Pack = Callable[[Sequence[Manifest]], Sequence[tuple[Piece, ...]]]
"""Manifests of this rank's clients to the pieces of each micro-batch."""


class _State(IntEnum):
    PLANNED = 0
    OPEN = 1
    READY = 2
    FORWARDED = 3
    GRADIENTS_READY = 4
    DONE = 5


@dataclass(eq=False)
class _Entry:
    """A micro-batch on its way; `awaited` are the clients whose activations or gradients it still waits for."""

    plan: MicroBatch
    state: _State = _State.PLANNED
    pieces: dict[str, Piece] = field(default_factory=dict)
    forwarded: tuple[Piece, ...] = ()
    awaited: set[str] = field(default_factory=set)
    turn: int = 0
    """When it became READY or GRADIENTS_READY, as a count of events: the older goes first."""

    @property
    def holds_memory(self) -> bool:
        """Past PLANNED it has, or waits for, activations or a graph."""
        return bool(self.pieces or self.forwarded)


@dataclass
class _Window:
    """A planned window; the oldest one runs once it is started."""

    number: int
    entries: dict[int, _Entry]
    planned: dict[str, deque[_Entry]] = field(default_factory=dict)
    """PLANNED ones with pieces, by the client of their first piece; both in the order of the plan."""
    waiting: Counter[str] = field(default_factory=Counter)
    """Number of these, by client."""
    empty: deque[_Entry] = field(default_factory=deque)
    """PLANNED ones without pieces."""
    live: dict[int, _Entry] = field(default_factory=dict)
    """OPEN to GRADIENTS_READY, in the order they were opened."""
    num_done: int = 0
    lost_masked_tokens: int = 0

    def add(self, entry: _Entry) -> None:
        """One more PLANNED micro-batch."""
        self.entries[entry.plan.index] = entry
        if entry.pieces:
            self.planned.setdefault(entry.plan.pieces[0].client, deque()).append(entry)
            self.waiting.update(entry.pieces.keys())
        else:
            self.empty.append(entry)

    def take(self, entry: _Entry) -> None:
        """A PLANNED micro-batch is not to be opened any more, or not as what it was."""
        if entry in self.empty:
            self.empty.remove(entry)
            return
        first = entry.plan.pieces[0].client
        self.planned[first].remove(entry)
        if not self.planned[first]:
            del self.planned[first]


_MANIFEST = ("manifest", 0)


class PipelineQueue:
    """The scheduling state of one rank over all windows.

    Every method that reports an event raises WireError when the event is against the protocol (a manifest twice,
    activations without credit, an unknown client); the queue is then unchanged and the caller drops that client with
    `lose`.
    """

    def __init__(
        self,
        micro_batches_in_flight: int,
        pack: Pack,
        order: Literal["arrival", "fixed"] = "arrival",
        lockstep_forwards: bool = False,
        silence_timeout: float = math.inf,
        first_window: int = 0,
        num_windows: float = math.inf,
        windows_ahead: int = 1,
        deadlines: Deadlines | None = None,
    ) -> None:
        self._depth = self._ahead = micro_batches_in_flight
        self._pack = pack
        self._order = order
        self._patterned = lockstep_forwards or order == "fixed"
        self._silence_timeout = silence_timeout
        self._num_windows = num_windows
        self._windows_ahead = windows_ahead
        self._deadlines = deadlines
        self._next_window = first_window
        self._next_index = 0
        self._windows: deque[_Window] = deque()
        self._running = self._is_alone = False
        self._manifests: dict[str, Manifest] = {}
        self._owed_since: dict[str, dict[tuple[str, int], float]] = {}
        """What clients owe and since when, on a clock that stands still while the rank is busy (see `stop_clocks`)."""
        self._questions: list[tuple[float, str, tuple[str, int]]] = []
        """A heap of what is in `_owed_since`, the oldest first; some of it is answered by now."""
        self._overdue: dict[str, float] = {}
        """Clients with a question older than any learned deadline may be, and when it was asked."""
        self._last_answer: dict[str, float] = {}
        """When each client last answered, on the same clock."""
        self._excused = 0.0
        self._asked: dict[tuple[str, tuple[str, int]], float] = {}
        """When each answer was asked for by the wall's clock, from which round trips are learned."""
        self._benched: set[str] = set()
        self._behind: set[str] = set()
        self._skipped: set[tuple[str, int]] = set()
        self._answered: list[tuple[str, str, float]] = []
        self._events = 0
        self._pattern: list[type[Forward] | type[Backward]] = []

    # -- events ---------------------------------------------------------------------------------------------------

    def join(self, client: str, now: float) -> None:
        """A client is here; its manifest of the next window that is not planned yet is awaited."""
        if client in self._owed_since:
            raise WireError(f"client {client} is already connected; give each client its own --id")
        self._owed_since[client] = {}
        if self._next_window < self._num_windows:
            self._ask(client, _MANIFEST, now - self._excused)

    def lose(self, client: str) -> None:
        """A client is gone: what it still owed is dropped and accounted for; nobody else is held up."""
        if client not in self._owed_since:
            return
        self._drop_pieces(client)
        for answer in self._owed_since.pop(client):
            self._asked.pop((client, answer), None)
        self._manifests.pop(client, None)
        self._benched.discard(client)
        self._behind.discard(client)
        self._last_answer.pop(client, None)
        if self._deadlines is not None:
            self._deadlines.forget(client)
        self._skipped = {skipped for skipped in self._skipped if skipped[0] != client}

    def heard(self, client: str, now: float) -> None:
        """A client that was skipped shows that it is still there: the next plan waits for it again."""
        if client in self._benched:
            self._benched.remove(client)
            self._owed_since[client].pop(_MANIFEST, None)
            if client not in self._manifests and self._next_window < self._num_windows:
                self._ask(client, _MANIFEST, now - self._excused)

    def manifest(self, manifest: Manifest) -> bool:
        """A client says what it brings to the next window; it may say so while others still run.

        False if that window was planned without it, because it was late: it must be told which is next.
        """
        client = manifest.client
        self._known(client)
        if manifest.window < self._next_window and client in self._behind:
            return False
        if manifest.window != self._next_window:
            raise WireError(f"client {client}: manifest of window {manifest.window} instead of {self._next_window}")
        if client in self._manifests:
            raise WireError(f"client {client}: a second manifest of window {manifest.window}")
        self._manifests[client] = manifest
        self._behind.discard(client)
        self._owed_since[client].pop(_MANIFEST, None)
        return True

    def activations(self, client: str, micro_batch: int) -> Piece:
        """A client's activations of a micro-batch are here, checked; returns the piece they belong to."""
        return self._answer(client, micro_batch, _State.OPEN, "activations")

    def gradient(self, client: str, micro_batch: int) -> Piece:
        """A client's gradient of a micro-batch's hidden states is here, checked; returns its piece."""
        return self._answer(client, micro_batch, _State.FORWARDED, "gradient")

    def expected_piece(self, client: str, micro_batch: int, kind: Literal["activations", "gradient"]) -> Piece:
        """The piece a message of this kind would belong to, to check it before it is reported; WireError if none."""
        state = _State.OPEN if kind == "activations" else _State.FORWARDED
        return self._awaiting(client, micro_batch, state, kind).pieces[client]

    def window_of(self, micro_batch: int) -> int | None:
        """The window that holds this micro-batch; None if it is not planned, or done with."""
        return next((window.number for window in self._windows if micro_batch in window.entries), None)

    def was_skipped(self, client: str, micro_batch: int) -> bool:
        """Whether this piece was given up because its client was late; what still comes of it is to be ignored."""
        return (client, micro_batch) in self._skipped

    def stop_clocks(self, seconds: float) -> None:
        """The rank was busy for so long and could neither ask nor listen: no client's silence counts that time."""
        self._excused += seconds

    # -- windows --------------------------------------------------------------------------------------------------

    @property
    def clients(self) -> frozenset[str]:
        """Connected clients."""
        return frozenset(self._owed_since)

    def is_connected(self, client: str) -> bool:
        """Whether it is one of `clients`."""
        return client in self._owed_since

    @property
    def present(self) -> frozenset[str]:
        """Connected clients that are not passed over for being late."""
        return self.clients - self._benched

    @property
    def next_window(self) -> int:
        """The next window that will be planned."""
        return self._next_window

    @property
    def planned(self) -> bool:
        """The next window to start is planned."""
        return bool(self._windows) and not self._running

    @property
    def participants(self) -> frozenset[str]:
        """Clients with pieces in the window that runs or is to start; not who was lost or skipped before."""
        entries = self._windows[0].entries.values() if self._windows else ()
        return frozenset(client for entry in entries for client in entry.pieces)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches planned for the window to start; 0 if it is not planned."""
        return len(self._windows[0].entries) if self.planned else 0

    @property
    def masked_tokens(self) -> int:
        """Masked tokens of the window to start, of clients that are still there; 0 if it is not planned."""
        entries = self._windows[0].entries.values() if self.planned else ()
        return sum(piece.masked for entry in entries for piece in entry.pieces.values())

    def start(
        self,
        num_micro_batches: int,
        now: float,
        micro_batches_in_flight: int | None = None,
        micro_batches_ahead: int | None = None,
        is_alone: bool = False,
    ) -> tuple[int, ...]:
        """Begin the oldest planned window, with dummies up to `num_micro_batches`; returns its micro-batches.

        `micro_batches_ahead` have credit or are here beyond those in flight; by default as many. `is_alone` says that
        no other rank has pieces in this window: when all of this rank's clients are late, too, no window begins
        without them, for none would be left to train on.
        """
        if not self.planned:
            raise RuntimeError("start: the previous window has not stepped, or the next one is not planned")
        window = self._windows[0]
        self._depth = micro_batches_in_flight or self._depth
        self._ahead = micro_batches_ahead or self._depth
        self._running, self._is_alone = True, is_alone
        planned = len(window.entries)
        # Dummies come after all that is planned ahead, since their number is known only now.
        for _ in range(num_micro_batches - planned):
            window.add(_Entry(MicroBatch(self._next_index, ())))
            self._next_index += 1
        for entry in window.live.values():
            for client in entry.awaited:
                self._ask(client, ("activations", entry.plan.index), now - self._excused)
        self._pattern = _pattern(len(window.entries), self._depth)[::-1]
        return tuple(window.entries)

    def decide(self, now: float) -> Decision | None:
        """The next thing to do, already counted as done; None: wait for an event."""
        self._learn(now)
        now -= self._excused
        if (late := self._late(now)) is not None:
            return late
        if self._may_plan():
            return self._plan(now)
        if (entry := self._to_open()) is not None:
            return self._open(*entry, now)
        return self._compute(now) if self._running else None

    # -- inside: who is late ----------------------------------------------------------------------------------------

    def _learn(self, now: float) -> None:
        for client, what, asked in self._answered:
            if self._deadlines is None:
                continue
            # Answers to what is not asked in earnest yet, of a window ahead, show that a client is there, too.
            self._last_answer[client] = now - self._excused
            if asked < math.inf:
                self._deadlines.learn(client, now - asked, what)
        self._answered.clear()

    def _ask(self, client: str, answer: tuple[str, int], since: float) -> None:
        self._owed_since[client][answer] = since
        self._asked[client, answer] = since + self._excused
        if since < math.inf:
            heapq.heappush(self._questions, (since, client, answer))

    def _late(self, now: float) -> Expire | Skip | None:
        # No learned deadline is shorter than the floor, so only what is older needs a look.
        shortest = min(self._silence_timeout, self._deadlines.floor if self._deadlines else math.inf)
        while self._questions and now - self._questions[0][0] > shortest:
            since, client, answer = heapq.heappop(self._questions)
            if self._owed_since.get(client, {}).get(answer) == since:
                self._overdue[client] = min(since, self._overdue.get(client, math.inf))
        for client in sorted(self._overdue):
            owed = self._owed_since.get(client, {})
            oldest = min(owed.values(), default=math.inf)
            if now - oldest <= shortest:
                del self._overdue[client]
            elif now - oldest > self._silence_timeout:
                del self._overdue[client]
                self.lose(client)
                return Expire(client)
            elif self._deadlines is not None and client not in self._benched:
                answers = [since for answer, since in owed.items() if answer != _MANIFEST]
                # Several answers come one after another: only a client that gives none at all is late.
                quiet_since = max(min(answers, default=math.inf), self._last_answer.get(client, -math.inf))
                if answers and now - quiet_since > self._deadlines.deadline(client):
                    return self._skip(client, oldest)
        return None

    def _skip(self, client: str, oldest: float) -> Skip:
        self._benched.add(client)
        dropped = self._drop_pieces(client)
        self._skipped.update((client, micro_batch) for _, micro_batch in dropped)
        for answer in self._owed_since[client]:
            self._asked.pop((client, answer), None)
        # Silence still counts, from the first question it left open.
        self._owed_since[client] = {}
        self._ask(client, _MANIFEST, oldest)
        return Skip(client, dropped)

    def _drop_pieces(self, client: str) -> tuple[tuple[int, int], ...]:
        """Let all windows go on without this client, but for gradients that are here; (window, micro-batch) of each."""
        dropped = []
        for window, entry in self._all_entries():
            if client not in entry.pieces or entry.state is _State.DONE:
                continue
            # A gradient that is already here (GRADIENTS_READY, or given before others') still counts.
            if entry.state in (_State.FORWARDED, _State.GRADIENTS_READY) and client not in entry.awaited:
                continue
            masked = entry.pieces.pop(client).masked
            if self._running and window is self._windows[0]:
                window.lost_masked_tokens += masked
            dropped.append((window.number, entry.plan.index))
            entry.awaited.discard(client)
            if entry.state is not _State.PLANNED:
                self._advance(entry)
            elif not entry.pieces:
                window.take(entry)
                window.empty.append(entry)
        for window in self._windows:
            del window.waiting[client]
        return tuple(dropped)

    # -- inside: planning and credit --------------------------------------------------------------------------------

    def _may_plan(self) -> bool:
        if self._next_window >= self._num_windows or len(self._windows) > self._windows_ahead:
            return False
        if self._is_alone and self._benched and not self.present:
            return False
        # Counted first: the sets are large, and this is asked at every event.
        enough = len(self._manifests) >= len(self._owed_since) - len(self._benched)
        return enough and self.present <= set(self._manifests)

    def _plan(self, now: float) -> Plan:
        manifests = [manifest for client, manifest in self._manifests.items() if client not in self._benched]
        micro_batches = []
        for pieces in self._pack(manifests):
            micro_batches.append(MicroBatch(self._next_index, pieces))
            self._next_index += 1
        told = frozenset(self._manifests)
        passed_over = told & self._benched
        window = _Window(self._next_window, {})
        for plan in micro_batches:
            window.add(_Entry(plan, pieces={piece.client: piece for piece in plan.pieces}))
        self._windows.append(window)
        self._behind |= self._benched
        self._manifests = {}
        self._next_window += 1
        if self._next_window < self._num_windows:
            for client in told:
                if _MANIFEST not in self._owed_since[client]:
                    self._ask(client, _MANIFEST, now)
        else:
            for owed in self._owed_since.values():
                owed.pop(_MANIFEST, None)
        return Plan(self._next_window - 1, tuple(micro_batches), tuple(manifests), passed_over)

    def _to_open(self) -> tuple[_Window, _Entry] | None:
        # One window has all its credit before the next gets any: clients answer for that one when they are done with
        # this one, so it must never hold what this one needs.
        window = next((window for window in self._windows if window.planned or window.empty), None)
        entry = self._next_of(window) if window is not None else None
        return (window, entry) if window is not None and entry is not None and self._has_room(window, entry) else None

    def _next_of(self, window: _Window) -> _Entry | None:
        """The micro-batch of a window that gets credit next; None if its clients must answer first."""
        empty = min(window.empty, key=lambda entry: entry.plan.index, default=None)
        if self._order == "fixed":
            heads = [entries[0] for entries in window.planned.values()][:1] + ([empty] if empty is not None else [])
            return min(heads, key=lambda entry: entry.plan.index)
        # In the order of the plan, so that clients are done with a window one after another and go on to the next; but
        # nobody gets more than a fair part of the credit, which somebody slow could hold all of.
        fair = -(-(self._depth + self._ahead) // max(1, len(window.waiting)))
        taken = self._credit_taken()
        for client, entries in window.planned.items():
            for entry in entries:
                if all(taken[piece] < fair for piece in entry.pieces):
                    return entry
                if client in entry.pieces and taken[client] >= fair:
                    break
        return empty

    def _credit_taken(self) -> Counter[str]:
        """Answers that clients owe; activations of these clients that lie here count too, as gradients do not come."""
        live = [entry for window in self._windows for entry in window.live.values()]
        taken = Counter(client for entry in live for client in entry.awaited)
        lying = [client for entry in live if entry.state is _State.READY for client in entry.pieces if client in taken]
        return taken + Counter(lying)

    def _has_room(self, window: _Window, entry: _Entry) -> bool:
        if entry.pieces:
            num_live = sum(other.holds_memory for window in self._windows for other in window.live.values())
        else:
            num_live = sum(not other.holds_memory for other in window.live.values())
        return num_live < self._depth + self._ahead

    def _open(self, window: _Window, entry: _Entry, now: float) -> Open:
        window.take(entry)
        window.live[entry.plan.index] = entry
        entry.state = _State.OPEN
        entry.awaited = set(entry.pieces)
        # A client answers for the next window when it is done with this one: no clock runs before that starts.
        since = now if self._running and window is self._windows[0] else math.inf
        for client in entry.awaited:
            self._ask(client, ("activations", entry.plan.index), since)
            window.waiting[client] -= 1
            if not window.waiting[client]:
                del window.waiting[client]
        pieces = tuple(entry.pieces.values())
        self._advance(entry)
        return Open(window.number, entry.plan.index, pieces)

    # -- inside: the running window ---------------------------------------------------------------------------------

    def _compute(self, now: float) -> Forward | Backward | Step | None:
        if self._windows[0].num_done == len(self._windows[0].entries):
            return self._step()
        ready = self._first(_State.READY)
        graded = self._first(_State.GRADIENTS_READY)
        if self._patterned:
            kind = self._pattern[-1]
            ready = ready if kind is Forward else None
            graded = graded if kind is Backward else None
        elif self._in_flight() >= self._depth:
            ready = None
        # The dummy of a short rank (no pieces) only fills its waiting time.
        candidates = sorted((entry for entry in (ready, graded) if entry), key=lambda entry: not entry.plan.pieces)
        if not candidates:
            return None
        if self._patterned:
            self._pattern.pop()
        entry = candidates[0]
        return self._backward(entry) if entry.state is _State.GRADIENTS_READY else self._forward(entry, now)

    def _in_flight(self) -> int:
        return len(self._flying())

    def _flying(self) -> list[_Entry]:
        running = self._windows[0].live.values()
        return [entry for entry in running if entry.state in (_State.FORWARDED, _State.GRADIENTS_READY)]

    def _first(self, state: _State) -> _Entry | None:
        """The micro-batch of this state to take next: by age, real before dummy; in plan order if order is fixed."""
        running = self._windows[0].live.values()
        if self._order == "fixed":
            stage = (
                (_State.FORWARDED, _State.GRADIENTS_READY)
                if state is _State.GRADIENTS_READY
                else (_State.OPEN, _State.READY)
            )
            # Opened in plan order. Only the oldest counts: while it is not there yet, nothing may overtake it.
            oldest = next((entry for entry in running if entry.state in stage), None)
            return oldest if oldest is not None and oldest.state is state else None
        entries = [entry for entry in running if entry.state is state]
        if state is _State.READY and not self._patterned:
            entries = self._leave_room(entries)
        return min(entries, key=lambda entry: (not entry.plan.pieces, entry.turn), default=None)

    def _leave_room(self, ready: list[_Entry]) -> list[_Entry]:
        """The last place in flight is not for whom all the others wait: one slow to answer must not stop the body."""
        flying = self._flying()
        if self._depth == 1 or len(flying) < self._depth - 1:
            return ready
        blockers = set.intersection(*(entry.awaited for entry in flying))
        if not blockers:
            return ready
        others_wait = any(
            entry.state < _State.FORWARDED and entry.pieces and not blockers & set(entry.pieces)
            for entry in self._windows[0].entries.values()
        )
        return [entry for entry in ready if not blockers & set(entry.pieces)] if others_wait else ready

    def _forward(self, entry: _Entry, now: float) -> Forward:
        entry.state = _State.FORWARDED
        entry.forwarded = tuple(entry.pieces.values())
        entry.awaited = set(entry.pieces)
        for client in entry.awaited:
            self._ask(client, ("gradient", entry.plan.index), now)
        self._advance(entry)
        return Forward(entry.plan.index, entry.forwarded)

    def _backward(self, entry: _Entry) -> Backward:
        entry.state = _State.DONE
        window = self._windows[0]
        del window.live[entry.plan.index]
        window.num_done += 1
        is_last = window.num_done == len(window.entries)
        return Backward(entry.plan.index, tuple(entry.pieces.values()), is_last)

    def _step(self) -> Step:
        window = self._windows.popleft()
        self._running = False
        return Step(window.number, window.lost_masked_tokens)

    # -- inside: entries --------------------------------------------------------------------------------------------

    def _all_entries(self) -> Iterator[tuple[_Window, _Entry]]:
        return ((window, entry) for window in self._windows for entry in window.entries.values())

    def _known(self, client: str) -> None:
        if client not in self._owed_since:
            raise WireError(f"client {client} is not connected")

    def _awaiting(self, client: str, micro_batch: int, state: _State, what: str) -> _Entry:
        self._known(client)
        entry = next((w.entries[micro_batch] for w in self._windows if micro_batch in w.entries), None)
        if entry is None or entry.state is not state or client not in entry.awaited:
            raise WireError(f"client {client}: {what} of micro-batch {micro_batch}, which nobody asked for")
        return entry

    def _answer(self, client: str, micro_batch: int, state: _State, what: str) -> Piece:
        entry = self._awaiting(client, micro_batch, state, what)
        entry.awaited.remove(client)
        answer = what, micro_batch
        del self._owed_since[client][answer]
        self._answered.append((client, what, self._asked.pop((client, answer))))
        self._advance(entry)
        return entry.pieces[client]

    def _advance(self, entry: _Entry) -> None:
        """An OPEN or FORWARDED micro-batch that waits for nobody any more becomes READY or GRADIENTS_READY."""
        if entry.awaited or entry.state not in (_State.OPEN, _State.FORWARDED):
            return
        entry.state = _State.READY if entry.state is _State.OPEN else _State.GRADIENTS_READY
        self._events += 1
        entry.turn = self._events


def _pattern(num_micro_batches: int, depth: int) -> list[type[Forward] | type[Backward]]:
    """Kinds of a window's operations, the same on every rank: fill to `depth`, then one backward, one forward."""
    fill = min(depth, num_micro_batches)
    steady: list[type[Forward] | type[Backward]] = [Backward, Forward] * (num_micro_batches - fill)
    return [Forward] * fill + steady + [Backward] * fill
