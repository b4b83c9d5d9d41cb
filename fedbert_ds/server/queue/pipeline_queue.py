"""The pipeline queue of one rank: events in, decisions out.

It knows nothing of tensors, networks, threads or the wall clock. The rank reports what happened (a
client joined or was lost, a manifest, activations or a gradient arrived, a window started, time
passed) and carries out what `decide` returns. The books behind it have rooms of their own: `roster`
(clients and manifests), `schedule` (planned windows and states of micro-batches), `deadlines` (open
questions); `priority` says whose turn it is.

The body never waits for what could have been asked before. While one window runs the next is
planned, from manifests that clients send ahead, and gets credit as soon as the running one has all
of its own. Only forwards wait for the step.

A decision takes time in proportion to the micro-batches in flight, not to clients or the size of a
window: one rank serves thousands.

Bounds: at most `in_flight` micro-batches are FORWARDED or GRADIENTS_READY (the body holds their
graphs), and at most `ahead` more are past PLANNED (their activations are buffered). Dummies hold no
memory and do not count. `schedule` has the states.

Lockstep: every rank emits as many forwards and backwards a window as the longest plan has
micro-batches, whoever is lost. With `lockstep_forwards` (ZeRO stage 3, whose forwards gather
parameters too) forwards and backwards follow one fixed pattern, agreed without a message.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal

from fedbert_ds.server.queue import priority
from fedbert_ds.server.queue.deadlines import Deadlines, Question
from fedbert_ds.server.queue.decisions import Backward, Decision, Expire, Forward, Open, Plan, Step, Suspend
from fedbert_ds.server.queue.in_flight import InFlightLimits
from fedbert_ds.server.queue.packing import Piece
from fedbert_ds.server.queue.roster import Roster, TakesPart, everybody
from fedbert_ds.server.queue.schedule import Kind, Schedule, State
from fedbert_ds.wire.messages import Manifest

Pack = Callable[[Sequence[Manifest]], Sequence[tuple[Piece, ...]]]
"""Manifests of this rank's clients to the pieces of each micro-batch."""

MANIFEST = Question("manifest")


class PipelineQueue:
    """The scheduling state of one rank over all windows.

    Every method that reports an event raises WireError when the event is against the protocol (a
    manifest twice, activations without credit, an unknown client); the queue is then unchanged and
    the caller drops that client with `lose`.
    """

    def __init__(
        self,
        micro_batches_in_flight: int,
        pack: Pack,
        order: Literal["arrival", "fixed"] = "arrival",
        lockstep_forwards: bool = False,
        first_window: int = 0,
        num_windows: float = math.inf,
        windows_ahead: int = 1,
        deadlines: Deadlines | None = None,
        takes_part: TakesPart = everybody,
    ) -> None:
        self.deadlines = deadlines or Deadlines()
        """Open questions of all clients, the rank's own too; `decide` says who expired."""
        self.schedule = Schedule()
        """Planned windows, for the rank to read."""
        self.roster = Roster(first_window, num_windows, takes_part)
        """Clients and the windows they take part in, for the rank to read."""
        self._limits = InFlightLimits(micro_batches_in_flight, micro_batches_in_flight)
        self._pack = pack
        self._is_fixed = order == "fixed"
        self._is_lockstep = lockstep_forwards or order == "fixed"
        self._windows_ahead = windows_ahead
        self._elsewhere: frozenset[str] | None = None
        self._due: list[priority.Operation] = []
        """With lockstep, the operations left in the running window; the next one is last."""
        self._answers: list[tuple[str, Question]] = []
        """Answers since the last decision; the next one closes their questions."""
        self._skipped: defaultdict[str, set[int]] = defaultdict(set)

    # -- who is here -------------------------------------------------------------------------------

    @property
    def clients(self) -> frozenset[str]:
        """Connected clients."""
        return self.roster.clients

    @property
    def active(self) -> frozenset[str]:
        """Connected clients that are not suspended."""
        return self.roster.active

    def is_connected(self, client: str) -> bool:
        """Whether it is one of `clients`."""
        return self.roster.is_connected(client)

    # -- events ------------------------------------------------------------------------------------

    def join(self, client: str, now: float, is_awaited: bool = True) -> None:
        """A client is here; its manifest is awaited, once the next window to plan is one of its.

        If it is not `is_awaited`, windows are planned without it until it has sent a manifest.
        """
        self.roster.add(client, is_awaited)
        if self.roster.owes_manifest(client):
            self.deadlines.ask(client, MANIFEST, now)

    def lose(self, client: str) -> None:
        """A client is gone: its pieces count as lost, its questions are closed."""
        if not self.roster.is_connected(client):
            return
        self.roster.remove(client)
        self.schedule.drop(client)
        self.deadlines.forget(client)
        self._skipped.pop(client, None)

    def hold(self, is_held: bool) -> None:
        """Plan no window while held: clients are awaited that are not here."""
        self.roster.is_held = is_held

    def roll_back(self, window: int, now: float) -> None:
        """Undo the windows from `window` on: every client must announce what it brings anew."""
        self.schedule.roll_back()
        self.roster.roll_back(window)
        self._due.clear()
        self._answers.clear()
        self._skipped.clear()
        for client in self.clients:
            self.deadlines.close_all(client)
            if self.roster.owes_manifest(client):
                self.deadlines.ask(client, MANIFEST, now)

    def reactivate(self, client: str, now: float) -> None:
        """A client was heard from: if it was suspended, the next plan waits for it again."""
        if self.roster.reactivate(client):
            self.deadlines.cancel(client, MANIFEST)
            if self.roster.owes_manifest(client):
                self.deadlines.ask(client, MANIFEST, now)

    def manifest(self, manifest: Manifest) -> bool:
        """A client announces what it brings to its next window, while others may still run.

        False if that window was planned without it, because it was suspended: it must be told
        which window is next.
        """
        if not self.roster.announce(manifest):
            return False
        self.deadlines.cancel(manifest.client, MANIFEST)
        return True

    def answer(self, client: str, micro_batch: int, kind: Kind) -> Piece:
        """A client's activations, or its gradient of hidden states, are here; returns their piece.

        They have been checked.
        """
        self.roster.require(client)
        piece = self.schedule.answer(client, micro_batch, kind)
        self._answers.append((client, Question(kind, micro_batch)))
        return piece

    def expected_piece(self, client: str, micro_batch: int, kind: Kind) -> Piece:
        """The piece that such a message belongs to, to check it first; WireError if none."""
        self.roster.require(client)
        return self.schedule.awaited(client, micro_batch, kind).pieces[client]

    def take_skipped(self, client: str, micro_batch: int) -> bool:
        """As `was_skipped`, once: of each piece one answer may be on its way."""
        was_skipped = self.was_skipped(client, micro_batch)
        if was_skipped:
            self._skipped[client].remove(micro_batch)
        return was_skipped

    def was_skipped(self, client: str, micro_batch: int) -> bool:
        """Whether this piece was skipped: what still comes of it is to be ignored."""
        return micro_batch in self._skipped.get(client, ())

    def start(
        self,
        num_micro_batches: int,
        now: float,
        limits: InFlightLimits | None = None,
        elsewhere: frozenset[str] | None = None,
    ) -> tuple[int, ...]:
        """Begin the oldest planned window with this many micro-batches; returns their indices.

        Dummies fill it up to `num_micro_batches`. `limits` hold from now on; by default they stay.
        `elsewhere` are the active clients of other ranks (None: enough of them for every window).
        A window whose participants are all here and all suspended is not planned: nobody would
        train in it. One that has no participants here runs on this rank with dummies.
        """
        window = self.schedule.start(num_micro_batches)
        self._limits = limits or self._limits
        self._elsewhere = elsewhere
        for micro_batch in window.live.values():
            for client in micro_batch.awaited:
                self.deadlines.ask(client, Question("activations", micro_batch.index), now)
        if self._is_lockstep:
            self._due = priority.lockstep_pattern(len(window.micro_batches), self._limits.in_flight)[::-1]
        return tuple(window.micro_batches)

    # -- decisions ---------------------------------------------------------------------------------

    def decide(self, now: float) -> Decision | None:
        """The next thing to do, already counted as done; None: wait for an event."""
        for client, question in self._answers:
            self.deadlines.answered(client, question, now)
        self._answers.clear()
        return self._go_on_without(now) or self._plan(now) or self._open(now) or self._compute(now)

    def _go_on_without(self, now: float) -> Expire | Suspend | None:
        """Windows go on without a client that is late."""
        late = self.deadlines.late(now)
        if late is None:
            return None
        client = late.client
        if late.is_gone:
            self.lose(client)
            return Expire(client)
        self.roster.suspend(client)
        self.deadlines.suspend(client, MANIFEST)
        if not self.roster.takes_part([client]):
            # Nothing is asked of it, until a window of its own is next.
            self.deadlines.cancel(client, MANIFEST)
        skipped = self.schedule.drop(client)
        self._skipped[client].update(micro_batch for _, micro_batch in skipped)
        return Suspend(client, skipped)

    def _plan(self, now: float) -> Plan | None:
        """The next window is planned once every active participant has announced what it brings."""
        is_far_ahead = len(self.schedule.windows) > self._windows_ahead
        if not self.roster.is_complete or is_far_ahead or self.roster.would_be_empty(self._elsewhere):
            return None
        number = self.roster.next_window
        manifests, suspended = self.roster.close()
        micro_batches = self.schedule.plan(number, self._pack(manifests))
        if self.roster.is_over:
            for client in self.clients:
                self.deadlines.cancel(client, MANIFEST)
        else:
            for client in self.roster.awaited:
                if self.deadlines.asked_at(client, MANIFEST) is None:
                    self.deadlines.ask(client, MANIFEST, now)
        return Plan(number, micro_batches, manifests, suspended)

    def _open(self, now: float) -> Open | None:
        """Credit goes to the next micro-batch that there is room for."""
        chosen = priority.next_to_open(self.schedule.windows, self._limits, self._is_fixed)
        if chosen is None:
            return None
        window, micro_batch = chosen
        pieces = self.schedule.open(window, micro_batch)
        is_due = self.schedule.is_running and window is self.schedule.windows[0]
        for piece in pieces:
            self.deadlines.ask(piece.client, Question("activations", micro_batch.index), now, is_due)
        return Open(window.number, micro_batch.index, pieces)

    def _compute(self, now: float) -> Forward | Backward | Step | None:
        """The running window's next operation on the body."""
        if not self.schedule.is_running:
            return None
        window = self.schedule.windows[0]
        if window.is_done:
            self.schedule.step()
            return Step(window.number, window.lost_masked_tokens)
        due = self._due[-1] if self._due else None
        micro_batch = priority.next_to_compute(window, self._limits.in_flight, self._is_fixed, due)
        if micro_batch is None:
            return None
        if self._due:
            self._due.pop()
        if micro_batch.state is State.GRADIENTS_READY:
            pieces = self.schedule.backward(micro_batch)
            return Backward(micro_batch.index, pieces)
        pieces = self.schedule.forward(micro_batch)
        for piece in pieces:
            self.deadlines.ask(piece.client, Question("gradient", micro_batch.index), now)
        return Forward(micro_batch.index, pieces)
