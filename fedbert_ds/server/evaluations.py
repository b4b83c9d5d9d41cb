"""Evaluations while a run trains: asks every client for its held-out loss, keeps books, the best.

An evaluation moves nothing: no gradient, no dropout, no random number, and windows that clients
have begun ahead wait for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fedbert_ds.config import RunSection
from fedbert_ds.server.queue.deadlines import Question
from fedbert_ds.server.rooms import Rooms
from fedbert_ds.telemetry.evaluations import (
    Evaluation,
    HeldOutLoss,
    MeasuresOf,
    best_of,
    evaluation_of,
    without_improvement,
)
from fedbert_ds.wire import fedbert_pb2 as pb

ASKED_AT_ONCE = 8
"""Clients of a rank whose activations wait for the body at a time: what they hold is bounded."""

KeepBest = Callable[[Evaluation], bool]
"""Writes the whole model as it is; whether it could. All ranks call it."""


class Evaluations:
    """The evaluations of a run; all ranks call it for the same windows.

    `history` are those of earlier sessions, the same on all ranks. `on_evaluation` hears every list
    of all evaluations so far. `keep_best` is called with an evaluation that is better than all
    before. `measures_of` makes a task's measures of clients' counts.
    """

    def __init__(
        self,
        rooms: Rooms,
        run: RunSection,
        history: Sequence[Evaluation] = (),
        on_evaluation: Callable[[Sequence[Evaluation]], None] = lambda _: None,
        keep_best: KeepBest | None = None,
        measures_of: MeasuresOf | None = None,
    ) -> None:
        self._rooms = rooms
        self._run = run
        self._history = list(history)
        self._on_evaluation = on_evaluation
        self._keep_best = keep_best
        self._measures_of = measures_of

    @property
    def history(self) -> tuple[Evaluation, ...]:
        """All that count, in order."""
        return tuple(self._history)

    @property
    def is_exhausted(self) -> bool:
        """`run.early_stopping_patience` evaluations in a row were no better than one before."""
        patience = self._run.early_stopping_patience
        return patience is not None and without_improvement(self._history) >= patience

    def is_due(self, window: int) -> bool:
        """Whether the state before `window` is to be evaluated, and was not."""
        every = self._run.evaluate_every
        if every is None or window == 0 or any(evaluation.window == window for evaluation in self._history):
            return False
        return window % every == 0 or window == self._run.windows

    def roll_back(self, window: int) -> None:
        """The windows from `window` on are trained again. The state before it stays evaluated."""
        self._history = [evaluation for evaluation in self._history if evaluation.window <= window]

    def run(self, window: int) -> bool:
        """Evaluate the state before `window`. Returns whether it counts: where the run waits for a
        client that is lost meanwhile, it is evaluated again once everybody is back.
        """
        rooms = self._rooms
        with rooms.time.charged("evaluating"):
            asked = rooms.queue.clients
            losses = self._collect(window)
            with self._clocks_stopped():
                is_broken = bool(rooms.membership.absent or rooms.lost_elsewhere)
                parts = rooms.rank_group.gather(
                    (losses, asked, is_broken), tuple[dict[str, HeldOutLoss], frozenset[str], bool]
                )
            if any(broken for _, _, broken in parts):
                return False
            together = {client: loss for part, _, _ in parts for client, loss in part.items()}
            everybody = [client for _, clients, _ in parts for client in clients]
            evaluation = evaluation_of(window, together, everybody, self._measures_of)
            candidates = [*self._history, evaluation]
            if self._keep_best is not None and best_of(candidates) is evaluation and not self._keep_best(evaluation):
                return False
            # Graphs that were compiled for it are no fault of training.
            rooms.engine.take_recompiles()
            self._history = candidates
            self._on_evaluation(self.history)
        return True

    def _collect(self, window: int) -> dict[str, HeldOutLoss]:
        """Ask this rank's clients; their losses, once each has reported or is gone.

        Where forwards hold collectives, all ranks forward together, some of them nothing.
        """
        rooms, inbox = self._rooms, self._rooms.inbox.held_out
        # As before a save: a client then has the steps of all windows before, or is about to.
        rooms.service.finish_exchanges()
        inbox.begin(window)
        left = deque(sorted(rooms.queue.active))
        is_lockstep = rooms.engine.lockstep_forwards
        while True:
            while left and len(inbox.awaited) < ASKED_AT_ONCE:
                self._ask(left.popleft(), window)
            part = inbox.take_part()
            is_done = part is None and not inbox.awaited and not left
            if part is None and not is_done and not rooms.lost_elsewhere:
                rooms.micro_batches.send_finished(wait=True)
                rooms.service.attend()
                continue
            with self._clocks_stopped():
                if is_lockstep:
                    is_done = all(rooms.rank_group.gather(part is None, bool))
                elif part is None:
                    is_done = True
                if not is_done:
                    rooms.micro_batches.evaluate(window, part)
            if is_done:
                rooms.micro_batches.send_finished(wait=True)
                return inbox.losses
            rooms.micro_batches.send_finished()

    def _ask(self, client: str, window: int) -> None:
        rooms = self._rooms
        if not rooms.queue.is_connected(client):
            return
        rooms.inbox.held_out.expect(client)
        rooms.outbox.send(client, pb.ServerMessage(evaluate=pb.Evaluate(window=window)))
        rooms.queue.deadlines.ask(client, Question("evaluated", window), time.monotonic())

    @contextmanager
    def _clocks_stopped(self) -> Iterator[None]:
        """Clients are not late while the rank computes or waits for other ranks."""
        started = time.monotonic()
        yield
        self._rooms.queue.deadlines.stop_clocks(time.monotonic() - started)
