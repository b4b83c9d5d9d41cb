"""A rank's planned windows: which state each micro-batch is in, and which clients it waits for.

    PLANNED -> OPEN -> READY -> FORWARDED -> GRADIENTS_READY -> DONE

OPEN: clients have credit to send activations. READY: all of these are here.
GRADIENTS_READY: all gradients are here.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

from fedbert_ds.errors import WireError
from fedbert_ds.server.queue.packing import MicroBatch, Piece

Kind = Literal["activations", "gradient"]
"""The two answers that a client gives for a piece."""


class State(IntEnum):
    """Where a micro-batch is on its way; the order is the order of time."""

    PLANNED = 0
    OPEN = 1
    READY = 2
    FORWARDED = 3
    GRADIENTS_READY = 4
    DONE = 5


WAITING_FOR: dict[Kind, State] = {"activations": State.OPEN, "gradient": State.FORWARDED}


@dataclass(eq=False, slots=True)
class PlannedMicroBatch:
    """A micro-batch on its way through the queue."""

    plan: MicroBatch
    state: State = State.PLANNED
    pieces: dict[str, Piece] = field(init=False)
    """Pieces that still count, by client: those of lost and suspended clients are gone."""
    forwarded: tuple[Piece, ...] = ()
    """Pieces that were forwarded."""
    awaited: set[str] = field(default_factory=set)
    """Clients whose activations (OPEN) or gradients (FORWARDED) are not here yet."""
    turn: int = 0
    """A count of events when it became READY or GRADIENTS_READY: the lower, the older."""

    def __post_init__(self) -> None:
        self.pieces = {piece.client: piece for piece in self.plan.pieces}

    @property
    def index(self) -> int:
        """Unique among all windows of the rank."""
        return self.plan.index

    @property
    def is_dummy(self) -> bool:
        """It never had pieces: it keeps ranks in lockstep."""
        return not self.plan.pieces

    @property
    def holds_memory(self) -> bool:
        """Past PLANNED: it has, or waits for, activations or a graph."""
        return bool(self.pieces or self.forwarded)


class Window:
    """One planned window of a rank."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.micro_batches: dict[int, PlannedMicroBatch] = {}
        """All of them by index, in the order of the plan."""
        self.planned: dict[str, deque[PlannedMicroBatch]] = {}
        """PLANNED ones by the client of their first planned piece, in the order of the plan."""
        self.planned_of: Counter[str] = Counter()
        """How many of these each client has a piece in."""
        self.empty: deque[PlannedMicroBatch] = deque()
        """PLANNED ones without pieces: dummies, and those that lost all their clients."""
        self.live: dict[int, PlannedMicroBatch] = {}
        """OPEN to GRADIENTS_READY, in the order they were opened."""
        self.num_done = 0
        self.lost_masked_tokens = 0
        """Masked tokens of pieces that were dropped after the start."""

    @property
    def is_done(self) -> bool:
        """Every micro-batch is DONE."""
        return self.num_done == len(self.micro_batches)

    @property
    def in_flight(self) -> list[PlannedMicroBatch]:
        """Forwarded and not backwarded, the first opened first."""
        return [mb for mb in self.live.values() if mb.state in (State.FORWARDED, State.GRADIENTS_READY)]

    @property
    def wants_credit(self) -> bool:
        """Some micro-batch is still PLANNED."""
        return bool(self.planned or self.empty)

    def add(self, micro_batch: PlannedMicroBatch) -> None:
        """One more PLANNED micro-batch."""
        self.micro_batches[micro_batch.index] = micro_batch
        if micro_batch.is_dummy:
            self.empty.append(micro_batch)
            return
        self.planned.setdefault(micro_batch.plan.pieces[0].client, deque()).append(micro_batch)
        self.planned_of.update(micro_batch.pieces.keys())

    def open(self, micro_batch: PlannedMicroBatch) -> None:
        """PLANNED -> OPEN."""
        if micro_batch.pieces:
            self._take_planned(micro_batch)
        else:
            self.empty.remove(micro_batch)
        for client in micro_batch.pieces:
            self.planned_of[client] -= 1
            if not self.planned_of[client]:
                del self.planned_of[client]
        self.live[micro_batch.index] = micro_batch
        micro_batch.state = State.OPEN
        micro_batch.awaited = set(micro_batch.pieces)

    def drop(self, micro_batch: PlannedMicroBatch, client: str) -> Piece | None:
        """Drop this client's piece and return it. A piece whose gradient is here stays."""
        if client not in micro_batch.pieces or micro_batch.state is State.DONE:
            return None
        is_forwarded = micro_batch.state in (State.FORWARDED, State.GRADIENTS_READY)
        if is_forwarded and client not in micro_batch.awaited:
            return None
        piece = micro_batch.pieces.pop(client)
        micro_batch.awaited.discard(client)
        if micro_batch.state is State.PLANNED and not micro_batch.pieces:
            self._take_planned(micro_batch)
            self.empty.append(micro_batch)
        return piece

    def _take_planned(self, micro_batch: PlannedMicroBatch) -> None:
        first = micro_batch.plan.pieces[0].client
        self.planned[first].remove(micro_batch)
        if not self.planned[first]:
            del self.planned[first]


class Schedule:
    """All planned windows of a rank, the oldest first. The oldest one runs once it is started."""

    def __init__(self) -> None:
        self.windows: deque[Window] = deque()
        self.is_running = False
        """The oldest window has started."""
        self._next_index = 0
        self._turns = 0

    @property
    def is_planned(self) -> bool:
        """The next window to start is planned, and none runs."""
        return bool(self.windows) and not self.is_running

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches planned for the window to start; 0 if it is not planned."""
        return len(self.windows[0].micro_batches) if self.is_planned else 0

    @property
    def masked_tokens(self) -> int:
        """Masked tokens of the window to start, dropped pieces left out; 0 if it is not planned."""
        micro_batches = self.windows[0].micro_batches.values() if self.is_planned else ()
        return sum(piece.masked for micro_batch in micro_batches for piece in micro_batch.pieces.values())

    @property
    def participants(self) -> frozenset[str]:
        """Clients with pieces that count in the window that runs or is to start."""
        micro_batches = self.windows[0].micro_batches.values() if self.windows else ()
        return frozenset(client for micro_batch in micro_batches for client in micro_batch.pieces)

    def window_trained_by(self, client: str) -> int | None:
        """The running window, if a piece of this client counts in it whatever becomes of it."""
        if not self.is_running:
            return None
        done = (State.FORWARDED, State.GRADIENTS_READY, State.DONE)
        micro_batches = (each for each in self.windows[0].micro_batches.values() if each.state in done)
        has_piece = any(client in each.pieces and client not in each.awaited for each in micro_batches)
        return self.windows[0].number if has_piece else None

    @property
    def live(self) -> Iterator[PlannedMicroBatch]:
        """OPEN to GRADIENTS_READY, of all windows."""
        return (micro_batch for window in self.windows for micro_batch in window.live.values())

    def plan(self, number: int, packed: Iterable[tuple[Piece, ...]]) -> tuple[MicroBatch, ...]:
        """Append a window of these micro-batches."""
        window = Window(number)
        self.windows.append(window)
        return tuple(self._add(window, pieces).plan for pieces in packed)

    def start(self, num_micro_batches: int) -> Window:
        """The oldest window runs, with dummies up to `num_micro_batches`."""
        if not self.is_planned:
            raise RuntimeError("start: the previous window has not stepped, or the next one is not planned")
        window = self.windows[0]
        # Their number is known only now, so dummies come after all windows planned ahead.
        for _ in range(num_micro_batches - len(window.micro_batches)):
            self._add(window, ())
        self.is_running = True
        return window

    def window_of(self, micro_batch: int) -> int | None:
        """The window of this micro-batch; None if it is not planned, or its window has ended."""
        return next((window.number for window in self.windows if micro_batch in window.micro_batches), None)

    def awaited(self, client: str, micro_batch: int, kind: Kind) -> PlannedMicroBatch:
        """The micro-batch that waits for this answer of the client; WireError if none does."""
        found = next((w.micro_batches[micro_batch] for w in self.windows if micro_batch in w.micro_batches), None)
        if found is None or found.state is not WAITING_FOR[kind] or client not in found.awaited:
            raise WireError(f"client {client}: {kind} of micro-batch {micro_batch}, which nobody asked for")
        return found

    def answer(self, client: str, micro_batch: int, kind: Kind) -> Piece:
        """An awaited answer is here; returns the piece it belongs to."""
        found = self.awaited(client, micro_batch, kind)
        found.awaited.remove(client)
        self._advance(found)
        return found.pieces[client]

    def open(self, window: Window, micro_batch: PlannedMicroBatch) -> tuple[Piece, ...]:
        """Give credit; returns the pieces to ask activations of."""
        window.open(micro_batch)
        self._advance(micro_batch)
        return tuple(micro_batch.pieces.values())

    def forward(self, micro_batch: PlannedMicroBatch) -> tuple[Piece, ...]:
        """READY -> FORWARDED; returns the pieces to ask gradients of."""
        micro_batch.state = State.FORWARDED
        micro_batch.forwarded = tuple(micro_batch.pieces.values())
        micro_batch.awaited = set(micro_batch.pieces)
        self._advance(micro_batch)
        return micro_batch.forwarded

    def backward(self, micro_batch: PlannedMicroBatch) -> tuple[Piece, ...]:
        """GRADIENTS_READY -> DONE in the running window; returns the pieces with a gradient."""
        window = self.windows[0]
        micro_batch.state = State.DONE
        del window.live[micro_batch.index]
        window.num_done += 1
        return tuple(micro_batch.pieces.values())

    def roll_back(self) -> None:
        """Forget every window, the running one too. Indices of micro-batches are not used again."""
        self.windows.clear()
        self.is_running = False

    def step(self) -> Window:
        """The running window has ended."""
        self.is_running = False
        return self.windows.popleft()

    def drop(self, client: str) -> tuple[tuple[int, int], ...]:
        """Windows go on without this client; (window, micro-batch) of each dropped piece."""
        dropped = []
        for window in self.windows:
            for micro_batch in window.micro_batches.values():
                if (piece := window.drop(micro_batch, client)) is None:
                    continue
                if self.is_running and window is self.windows[0]:
                    window.lost_masked_tokens += piece.masked
                dropped.append((window.number, micro_batch.index))
                self._advance(micro_batch)
            del window.planned_of[client]
        return tuple(dropped)

    def _add(self, window: Window, pieces: tuple[Piece, ...]) -> PlannedMicroBatch:
        micro_batch = PlannedMicroBatch(MicroBatch(self._next_index, pieces))
        self._next_index += 1
        window.add(micro_batch)
        return micro_batch

    def _advance(self, micro_batch: PlannedMicroBatch) -> None:
        """OPEN -> READY or FORWARDED -> GRADIENTS_READY, once nobody is awaited."""
        if micro_batch.awaited or micro_batch.state not in (State.OPEN, State.FORWARDED):
            return
        micro_batch.state = State.READY if micro_batch.state is State.OPEN else State.GRADIENTS_READY
        self._turns += 1
        micro_batch.turn = self._turns
