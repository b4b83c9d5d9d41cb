"""The pipeline queue of one rank: events in, decisions out.

It knows nothing of tensors, networks, threads or the wall clock: the caller reports what arrived (manifest,
activations, gradient, lost client, time) and carries out what `decide` returns (open, forward, backward, expire, step).
A micro-batch goes

    PLANNED -> OPEN -> READY -> FORWARDED -> GRADED -> DONE

where OPEN is the credit its clients wait for, READY means all activations are here, and GRADED all gradients.

Bounds: at most `micro_batches_in_flight` are FORWARDED or GRADED (graphs the body holds), at most twice as many are
past PLANNED (activations buffered beside them).

Lockstep: each rank emits as many forwards and backwards a window as its plan has micro-batches, whoever is lost. With
`lockstep_forwards` (ZeRO stage 3, whose forwards gather parameters too) the sequence of kinds is one fixed pattern,
agreed without a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Literal

from fedbert_ds.errors import WireError
from fedbert_ds.server.window import MicroBatch, Piece
from fedbert_ds.wire.messages import Manifest


@dataclass(frozen=True)
class Open:
    """Give the clients of these pieces credit to send activations."""

    micro_batch: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Forward:
    """Run the body forward over these pieces (none: a dummy) and send the hidden states back."""

    micro_batch: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Backward:
    """Run the body backward; pieces of the forward that are not named here get a zero gradient."""

    micro_batch: int
    pieces: tuple[Piece, ...]
    is_last: bool
    """The window's last backward on this rank: the gradient-accumulation boundary."""


@dataclass(frozen=True)
class Expire:
    """This client owed an answer for too long; it has been counted as lost."""

    client: str


@dataclass(frozen=True)
class Step:
    """Every micro-batch is done: step the optimizer."""

    window: int
    lost_masked_tokens: int
    """Masked tokens of the plan whose gradient is missing (zero) because their client was lost."""


Decision = Open | Forward | Backward | Expire | Step


class _State(IntEnum):
    PLANNED = 0
    OPEN = 1
    READY = 2
    FORWARDED = 3
    GRADED = 4
    DONE = 5


class _Phase(Enum):
    GATHERING = "gathering manifests"
    RUNNING = "running a window"


@dataclass
class _Entry:
    """A micro-batch on its way; `awaited` are the clients whose activations or gradients it still waits for."""

    plan: MicroBatch
    state: _State = _State.PLANNED
    pieces: dict[str, Piece] = field(default_factory=dict)
    forwarded: tuple[Piece, ...] = ()
    awaited: set[str] = field(default_factory=set)
    turn: int = 0
    """When it became READY or GRADED, as a count of events: the older goes first."""


class PipelineQueue:
    """The scheduling state of one rank over all windows.

    Every method that reports an event raises WireError when the event is against the protocol (a manifest twice,
    activations without credit, an unknown client); the queue is then unchanged and the caller drops that client with
    `lose`.
    """

    def __init__(
        self,
        micro_batches_in_flight: int,
        order: Literal["arrival", "fixed"] = "arrival",
        lockstep_forwards: bool = False,
        silence_timeout: float = float("inf"),
        first_window: int = 0,
    ) -> None:
        self._depth = micro_batches_in_flight
        self._order = order
        self._patterned = lockstep_forwards or order == "fixed"
        self._silence_timeout = silence_timeout
        self._phase = _Phase.GATHERING
        self._window = first_window
        self._entries: dict[int, _Entry] = {}
        self._manifests: dict[str, Manifest] = {}
        self._owed_since: dict[str, dict[tuple[str, int], float]] = {}
        self._events = 0
        self._pattern: list[type[Forward] | type[Backward]] = []
        self._lost_masked_tokens = 0

    # -- events ---------------------------------------------------------------------------------------------------

    def join(self, client: str, now: float) -> None:
        """A client is here; its manifest of the next window is awaited (now, or after the running window)."""
        if client in self._owed_since:
            raise WireError(f"client {client} is already connected; give each client its own --id")
        self._owed_since[client] = {} if self._phase is _Phase.RUNNING else {("manifest", 0): now}

    def lose(self, client: str) -> None:
        """A client is gone: what it still owed is dropped and accounted for; nobody else is held up."""
        if self._owed_since.pop(client, None) is None:
            return
        self._manifests.pop(client, None)
        for entry in self._entries.values():
            if client not in entry.pieces or entry.state is _State.DONE:
                continue
            # A gradient that is already here (GRADED, or given before others') still counts.
            if entry.state in (_State.FORWARDED, _State.GRADED) and client not in entry.awaited:
                continue
            self._lost_masked_tokens += entry.pieces.pop(client).masked
            entry.awaited.discard(client)
            if entry.state is not _State.PLANNED:
                self._advance(entry)

    def manifest(self, manifest: Manifest) -> None:
        """A client says what it brings to the next window; it may say so while this one still runs."""
        self._known(manifest.client)
        expected = self._window + (1 if self._phase is _Phase.RUNNING else 0)
        if manifest.window != expected:
            raise WireError(f"client {manifest.client}: manifest of window {manifest.window} instead of {expected}")
        if manifest.client in self._manifests:
            raise WireError(f"client {manifest.client}: a second manifest of window {manifest.window}")
        self._manifests[manifest.client] = manifest
        self._owed_since[manifest.client].pop(("manifest", 0), None)

    def activations(self, client: str, micro_batch: int) -> Piece:
        """A client's activations of a micro-batch are here, checked; returns the piece they belong to."""
        entry = self._awaiting(client, micro_batch, _State.OPEN, "activations")
        entry.awaited.remove(client)
        del self._owed_since[client]["activations", micro_batch]
        self._advance(entry)
        return entry.pieces[client]

    def gradient(self, client: str, micro_batch: int) -> Piece:
        """A client's gradient of a micro-batch's hidden states is here, checked; returns its piece."""
        entry = self._awaiting(client, micro_batch, _State.FORWARDED, "gradient")
        entry.awaited.remove(client)
        del self._owed_since[client]["gradient", micro_batch]
        self._advance(entry)
        return entry.pieces[client]

    def expected_piece(self, client: str, micro_batch: int, kind: Literal["activations", "gradient"]) -> Piece:
        """The piece a message of this kind would belong to, to check it before it is reported; WireError if none."""
        state = _State.OPEN if kind == "activations" else _State.FORWARDED
        return self._awaiting(client, micro_batch, state, kind).pieces[client]

    def excuse(self, seconds: float) -> None:
        """The rank was busy for so long and could neither ask nor listen: no client's silence counts that time."""
        for owed in self._owed_since.values():
            for answer in owed:
                owed[answer] += seconds

    # -- windows --------------------------------------------------------------------------------------------------

    @property
    def clients(self) -> frozenset[str]:
        """Connected clients."""
        return frozenset(self._owed_since)

    @property
    def gathered(self) -> bool:
        """Every connected client has given its manifest of the next window."""
        return self._phase is _Phase.GATHERING and set(self._manifests) == set(self._owed_since)

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """Manifests of the next window so far."""
        return tuple(self._manifests.values())

    def start(self, window: int, micro_batches: Sequence[MicroBatch]) -> None:
        """Begin a window with this rank's micro-batches; clients lost since the plan was made are dropped from it."""
        if self._phase is not _Phase.GATHERING:
            raise RuntimeError("start: the previous window has not stepped")
        self._phase = _Phase.RUNNING
        self._window = window
        # By manifest, not by name: a client that was lost and came back has another batch.
        planned, self._manifests = self._manifests, {}
        for owed in self._owed_since.values():
            owed.pop(("manifest", 0), None)
        self._lost_masked_tokens = 0
        self._entries = {}
        for plan in micro_batches:
            present = {piece.client: piece for piece in plan.pieces if piece.client in planned}
            self._lost_masked_tokens += sum(p.masked for p in plan.pieces if p.client not in present)
            self._entries[plan.index] = _Entry(plan, pieces=present)
        self._pattern = _pattern(len(micro_batches), self._depth)[::-1]

    def decide(self, now: float) -> Decision | None:
        """The next thing to do, already counted as done; None: wait for an event."""
        if (expired := self._expired(now)) is not None:
            self.lose(expired)
            return Expire(expired)
        if self._phase is not _Phase.RUNNING:
            return None
        if (entry := self._to_open()) is not None:
            return self._open(entry, now)
        if all(entry.state is _State.DONE for entry in self._entries.values()):
            return self._step(now)
        ready = self._first(_State.READY)
        graded = self._first(_State.GRADED)
        if self._patterned:
            kind = self._pattern[-1]
            ready = ready if kind is Forward else None
            graded = graded if kind is Backward else None
        elif self._in_flight() >= self._depth:
            ready = None
        # Backward first: it frees memory, and the dummy of a short rank (no pieces) only fills its waiting time.
        candidates = [entry for entry in (graded, ready) if entry is not None]
        candidates.sort(key=lambda entry: not entry.plan.pieces)
        for entry in candidates:
            if self._patterned:
                self._pattern.pop()
            return self._backward(entry) if entry.state is _State.GRADED else self._forward(entry, now)
        return None

    # -- inside ---------------------------------------------------------------------------------------------------

    def _known(self, client: str) -> None:
        if client not in self._owed_since:
            raise WireError(f"client {client} is not connected")

    def _awaiting(self, client: str, micro_batch: int, state: _State, what: str) -> _Entry:
        self._known(client)
        entry = self._entries.get(micro_batch)
        if entry is None or entry.state is not state or client not in entry.awaited:
            raise WireError(f"client {client}: {what} of micro-batch {micro_batch}, which nobody asked for")
        return entry

    def _advance(self, entry: _Entry) -> None:
        """An OPEN or FORWARDED micro-batch that waits for nobody any more becomes READY or GRADED."""
        if entry.awaited or entry.state not in (_State.OPEN, _State.FORWARDED):
            return
        entry.state = _State.READY if entry.state is _State.OPEN else _State.GRADED
        self._events += 1
        entry.turn = self._events

    def _expired(self, now: float) -> str | None:
        for client, owed in sorted(self._owed_since.items()):
            if owed and now - min(owed.values()) > self._silence_timeout:
                return client
        return None

    def _in_flight(self) -> int:
        return sum(entry.state in (_State.FORWARDED, _State.GRADED) for entry in self._entries.values())

    def _to_open(self) -> _Entry | None:
        past = sum(_State.PLANNED < entry.state < _State.DONE for entry in self._entries.values())
        if past >= 2 * self._depth:
            return None
        planned = [entry for entry in self._entries.values() if entry.state is _State.PLANNED]
        if self._order == "fixed":
            return planned[0] if planned else None
        return min(planned, key=lambda entry: (not entry.plan.pieces, self._burden(entry)), default=None)

    def _burden(self, entry: _Entry) -> int:
        """Answers its clients owe already: credit goes where least is owed, so that nobody slow can hold all of it."""
        return max((len(self._owed_since[client]) for client in entry.pieces), default=0)

    def _first(self, state: _State) -> _Entry | None:
        """The micro-batch of this state to take next: by age, real before dummy; in plan order if order is fixed."""
        if self._order == "fixed":
            stage = (_State.FORWARDED, _State.GRADED) if state is _State.GRADED else tuple(_State)[: _State.READY + 1]
            oldest = next((entry for entry in self._entries.values() if entry.state in stage), None)
            # Only the oldest counts: while it is not there yet, nothing may overtake it.
            return oldest if oldest is not None and oldest.state is state else None
        entries = [entry for entry in self._entries.values() if entry.state is state]
        return min(entries, key=lambda entry: (not entry.plan.pieces, entry.turn), default=None)

    def _open(self, entry: _Entry, now: float) -> Open:
        entry.state = _State.OPEN
        entry.awaited = set(entry.pieces)
        for client in entry.awaited:
            self._owed_since[client]["activations", entry.plan.index] = now
        pieces = tuple(entry.pieces.values())
        self._advance(entry)
        return Open(entry.plan.index, pieces)

    def _forward(self, entry: _Entry, now: float) -> Forward:
        entry.state = _State.FORWARDED
        entry.forwarded = tuple(entry.pieces.values())
        entry.awaited = set(entry.pieces)
        for client in entry.awaited:
            self._owed_since[client]["gradient", entry.plan.index] = now
        self._advance(entry)
        return Forward(entry.plan.index, entry.forwarded)

    def _backward(self, entry: _Entry) -> Backward:
        entry.state = _State.DONE
        is_last = all(other.state is _State.DONE for other in self._entries.values())
        return Backward(entry.plan.index, tuple(entry.pieces.values()), is_last)

    def _step(self, now: float) -> Step:
        self._phase = _Phase.GATHERING
        self._window += 1
        self._entries = {}
        for client, owed in self._owed_since.items():
            if client not in self._manifests:
                owed["manifest", 0] = now
        return Step(self._window - 1, self._lost_masked_tokens)


def _pattern(num_micro_batches: int, depth: int) -> list[type[Forward] | type[Backward]]:
    """Kinds of a window's operations, the same on every rank: fill to `depth`, then one backward, one forward."""
    fill = min(depth, num_micro_batches)
    steady: list[type[Forward] | type[Backward]] = [Backward, Forward] * (num_micro_batches - fill)
    return [Forward] * fill + steady + [Backward] * fill
