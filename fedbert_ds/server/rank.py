"""One rank's window loop, in step with the other ranks: gather, save, train a window."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from fedbert_ds.config import ClientsSection, OptimizerSection, RunSection
from fedbert_ds.errors import RunError, warn
from fedbert_ds.server.contract import RankStatus, Tally
from fedbert_ds.server.evaluations import Evaluations
from fedbert_ds.server.network.events import POLL_SECONDS
from fedbert_ds.server.newcomers import Newcomers
from fedbert_ds.server.queue.deadlines import Question
from fedbert_ds.server.queue.decisions import Backward, Forward, Step
from fedbert_ds.server.queue.in_flight import Demand, InFlightLimits, in_flight_limits
from fedbert_ds.server.rooms import Rooms

OnWindow = Callable[[int, Sequence[RankStatus]], None]
"""(finished window, statuses of all ranks)"""

NOTHING_SAVED = -1

PLANNED_AHEAD = 3
"""A queue may have planned this window and the next one, and asked for the one after it; with
staleness more."""


class Saving(Protocol):
    """Writes and loads the state before a window; all ranks call it together."""

    def save(self, window: int) -> bool:
        """Write it; whether it counts."""

    def load(self, window: int) -> None:
        """Take over what `save` wrote."""


class RankServer:
    """Trains on one rank. `train` returns the window before which it stopped, the same on all.

    `watch` runs while clients are awaited; it raises for a local client process that died.
    """

    def __init__(
        self,
        rooms: Rooms,
        run: RunSection,
        clients: ClientsSection,
        optimizer: OptimizerSection,
        limits: InFlightLimits | None,
        first_window: int,
        newcomers: Newcomers,
        watch: Callable[[], None] = lambda: None,
        evaluations: Evaluations | None = None,
    ) -> None:
        self._rooms = rooms
        self._evaluations = evaluations or Evaluations(rooms, run)
        self._queue, self._service, self._micro_batches = rooms.queue, rooms.service, rooms.micro_batches
        self._run, self._clients, self._optimizer = run, clients, optimizer
        self._fixed_limits = limits
        """Micro-batches in flight by the run file. None: from measurements."""
        self._first_window = first_window
        self._newcomers = newcomers
        self._watch = watch
        self._waits = clients.on_loss == "wait"
        self._rolls_back_to_checkpoint = self._waits and rooms.strategy.halves_are_personal
        """Clients hold what nobody else has, so windows are undone back to what they have saved."""
        self._update_bytes_told = 0
        self.clients: frozenset[str] = frozenset()
        """Connected clients of all ranks at the last gathering."""

    def connect(self) -> None:
        """Wait until every client has opened its stream, at whichever rank it is seated.

        One whose process ended before may join again. Who came and left is not waited for, unless
        the run waits for lost clients, and after `clients.join_timeout` seconds nobody is. Raises
        RunError, on every rank, if nobody has come by then.
        """
        deadline, come = time.monotonic() + self._clients.join_timeout, frozenset[str]()
        self._service.awaits_newcomers = True
        while True:
            status = self._status(self._first_window, Tally(), has_given_up=time.monotonic() > deadline)
            statuses = self._rooms.gathered(status, RankStatus)
            here = frozenset().union(*(status.clients for status in statuses))
            come = here if self._waits else come | here
            missing = sorted(self._rooms.members.seats.keys() - come)
            if not missing or any(status.stop for status in statuses):
                self._queue.hold(False)
                return
            if any(status.has_given_up for status in statuses):
                problem = f"{', '.join(missing)} joined but opened no stream; is server.advertise reachable from there?"
                if not here:
                    raise RunError(problem)
                self._rooms.membership.problems.append(problem)
                if self._rooms.rank_group.rank == 0:
                    warn(problem)
                self._queue.hold(bool(self._rooms.membership.absent))
                return
            self._newcomers.let_in(statuses, self._first_window + self._rooms.staleness + PLANNED_AHEAD)
            self._service.dispatch(self._service.next_event(POLL_SECONDS))
            self._watch()

    def train(
        self,
        on_window: OnWindow,
        saving: Saving,
        on_roll_back: Callable[[int], None] = lambda _: None,
        on_wait: Callable[[Sequence[RankStatus]], None] = lambda _: None,
    ) -> int:
        """Run windows until the last one, a stop request, or evaluations that are no better.

        No window begins without enough clients. Raises RunError, on every rank, when they do not
        come within `clients.join_timeout`; what is saved stays. `on_roll_back(window)` hears that
        the windows from `window` on are trained again, `on_wait(statuses)` that the run waits.
        """
        window = saved = reported = self._first_window
        if (self._rolls_back_to_checkpoint or self._rooms.remote is not None) and not window:
            # Others must have a state to go back to, so that of window 0 is saved, too.
            saved = NOTHING_SAVED
        self._service.awaits_newcomers = self._waits
        is_undone = False
        while True:
            statuses = self._gather(window, is_undone)
            self._rooms.health.settle(status.doubt for status in statuses)
            self._rooms.influence.learn(status.observed for status in statuses)
            self.clients = frozenset().union(*(status.clients for status in statuses))
            if window > reported:
                on_window(window - 1, statuses)
                reported = window
            lost_elsewhere = _lost_elsewhere(statuses)
            if lost_elsewhere:
                self._give_up_elsewhere(lost_elsewhere)
            else:
                self._newcomers.let_in(statuses, window + self._rooms.staleness + PLANNED_AHEAD)
            is_stopped = any(status.stop for status in statuses)
            is_ending = is_stopped or window == self._run.windows
            is_missed = any(status.absent for status in statuses)
            # With too few clients the run waits before it evaluates.
            may_evaluate = not is_stopped and not is_missed and (is_ending or not self._is_short(statuses))
            goes_far_back = self._rolls_back_to_checkpoint or bool(lost_elsewhere)
            if lost_elsewhere or (is_missed and (self._rolls_back_to_checkpoint or not is_ending)):
                window = reported = self._roll_back(saved if goes_far_back else window, saving, goes_far_back)
                self._evaluations.roll_back(window)
                on_roll_back(window)
            elif may_evaluate and self._evaluations.is_due(window) and not self._evaluations.run(window):
                continue  # somebody was lost, whom the run waits for
            is_over = is_stopped or window == self._run.windows or self._evaluations.is_exhausted
            is_short = not is_over and self._is_short(statuses)
            is_due = is_over or is_short or window % self._run.save_every == 0
            if window > saved and is_due and not (is_missed and goes_far_back) and not lost_elsewhere:
                with self._rooms.time.charged("saving"):
                    is_saved = saving.save(window)
                if not is_saved:
                    continue  # somebody was lost: the windows since `saved` are trained again
                saved = window
            if is_short:
                on_wait(statuses)
                is_over = not self._wait_for_clients(window, saved)
                is_undone = False
            elif not is_over:
                is_undone = not self._train_window(window, statuses)
                if not is_undone:
                    self._rooms.cursors.commit(window)
                    self._rooms.masked_counts.commit(self._rooms.strategy.exchange_after(window) != "nothing")
                    window += 1
            if is_over:
                return window

    def _is_short(self, statuses: Sequence[RankStatus]) -> bool:
        """No window may begin with the clients there are."""
        here = frozenset().union(*(status.clients for status in statuses))
        is_missed = any(status.absent for status in statuses) or bool(_lost_elsewhere(statuses))
        return is_missed or len(here) < self._clients.required

    def _give_up_elsewhere(self, reason: str) -> None:
        """The aggregator of another party is lost to some rank, so to all; and to their clients,
        which join again.
        """
        assert self._rooms.remote is not None
        self._rooms.remote.give_up(reason)
        self._service.hand_out_updates()

    def _look_elsewhere(self, statuses: Sequence[RankStatus], window: int) -> None:
        """Take up with the lost aggregator of another party, if it is back."""
        assert self._rooms.remote is not None
        if opened := statuses[0].opened_elsewhere:
            self._rooms.remote.reopen(opened, window)

    def _roll_back(self, window: int, saving: Saving, to_checkpoint: bool) -> int:
        """Undo what was done since the state before `window`; returns the window to go on with."""
        is_saved, window = window != NOTHING_SAVED, max(0, window)
        self._service.finish_exchanges()
        self._queue.hold(True)
        self._queue.roll_back(window, time.monotonic())
        self._rooms.inbox.roll_back()
        if to_checkpoint and is_saved:
            saving.load(window)
        else:
            self._rooms.cursors.roll_back()
        if not is_saved:
            self._service.restored = window
        self._service.roll_back(window)
        return window

    def _wait_for_clients(self, window: int, saved: int) -> bool:
        """Wait until a window may begin; False if a stop is requested first.

        Raises RunError after `clients.join_timeout` seconds.
        """
        deadline = time.monotonic() + self._clients.join_timeout
        # Nothing runs meanwhile, so the next window begins with whoever comes.
        self._service.awaits_newcomers = True
        while True:
            self._service.attend()
            self._watch()
            status = self._status(window, Tally(), has_given_up=time.monotonic() > deadline)
            statuses = self._rooms.gathered(status, RankStatus)
            if lost_elsewhere := _lost_elsewhere(statuses):
                self._give_up_elsewhere(lost_elsewhere)
                self._look_elsewhere(statuses, window)
            else:
                self._newcomers.let_in(statuses, window + self._rooms.staleness + PLANNED_AHEAD)
            if not self._is_short(statuses):
                self._queue.hold(False)
                self._service.awaits_newcomers = self._waits
                return True
            if any(status.stop for status in statuses):
                return False
            if any(status.has_given_up for status in statuses):
                here = sum(len(status.clients) for status in statuses)
                raise RunError(_too_few_clients(here, self._clients, statuses, saved))

    def _gather(self, window: int, is_undone: bool) -> list[RankStatus]:
        """Wait until this rank's next window is planned, then exchange statuses with all ranks.

        A window that `is_undone` is not planned.
        """
        is_last = window == self._run.windows
        membership = self._rooms.membership
        with self._rooms.trace.span("wait for plan", window=window):
            # Clients answer only once their updates are combined, and a running window counts their
            # silence. A rank that stops takes part in the combining too: the others wait for it.
            while not (
                self._rooms.exchange.is_done(window - self._rooms.staleness)
                and (
                    self._queue.schedule.is_planned
                    or is_last
                    or is_undone
                    or membership.absent
                    or self._rooms.lost_elsewhere
                    or self._rooms.stop.requested
                )
            ):
                self._service.attend()
        if is_last or self._rooms.stop.requested:
            # Count all bytes of the run. In earlier windows some may count in the next window.
            self._rooms.outbox.settle()
        # Nobody sees the status before the first window, unless the run then waits for somebody.
        new_problems = membership.take_new_problems() if window > self._first_window or membership.absent else ()
        status = replace(self._status(window, self._take_tally(), new_problems), observed=self._rooms.influence.take())
        with self._busy("gather", window=window):
            return self._rooms.gathered(status, RankStatus)

    def _status(
        self, window: int, tally: Tally, new_problems: tuple[str, ...] = (), has_given_up: bool = False
    ) -> RankStatus:
        membership, lost_elsewhere = self._rooms.membership, self._rooms.lost_elsewhere
        looks_for_it = bool(lost_elsewhere) and self._rooms.rank_group.rank == 0
        return RankStatus(
            num_micro_batches=self._queue.schedule.num_micro_batches,
            masked_tokens=self._queue.schedule.masked_tokens,
            demand=self._demand(),
            clients=self._queue.clients,
            stop=self._rooms.stop.requested,
            problems=tuple(membership.problems),
            new_problems=new_problems,
            tally=tally,
            active=self._queue.active,
            absent=frozenset(membership.absent),
            detached=frozenset(membership.detached),
            doubt=self._rooms.health.doubt,
            is_asked=self._newcomers.is_asked,
            has_given_up=has_given_up,
            lost_elsewhere=lost_elsewhere,
            opened_elsewhere=self._rooms.remote.opened_again() if looks_for_it and self._rooms.remote else b"",
        )

    def _train_window(self, window: int, statuses: Sequence[RankStatus]) -> bool:
        """Train a planned window, from its start to the body's step; False if it is undone."""
        self._service.restored = None
        self._start(window, statuses)
        while True:
            self._service.take_in()
            self._service.hand_out_updates()
            self._micro_batches.send_finished()
            match self._queue.decide(time.monotonic()):
                case None:
                    self._wait()
                case Forward(micro_batch, pieces) as forward:
                    with self._busy("forward", micro_batch=micro_batch):
                        arrived = [self._rooms.take_activations(micro_batch, piece.client) for piece in pieces]
                        self._micro_batches.forward(forward, arrived)
                case Backward(micro_batch, pieces) as backward:
                    with self._busy("backward", micro_batch=micro_batch):
                        gradients = {p.client: self._rooms.take_gradient(micro_batch, p.client) for p in pieces}
                        self._micro_batches.backward(backward, gradients)
                case Step(_, lost_masked_tokens):
                    self._micro_batches.end()
                    self._await_reports(window)
                    self._service.await_answers(self._rooms.exchange.awaited(window), Question("update", window))
                    return self._step(window, lost_masked_tokens)
                case decision:
                    self._service.carry_out(decision)

    def _start(self, window: int, statuses: Sequence[RankStatus]) -> None:
        """Begin a planned window, in step with the other ranks."""
        limits = self._fixed_limits or in_flight_limits(status.demand for status in statuses)
        masked_tokens = sum(status.masked_tokens for status in statuses)
        trains_alone = self._rooms.strategy.trains_alone
        num_micro_batches = 0 if trains_alone else max(1, *(status.num_micro_batches for status in statuses))
        others = (status for rank, status in enumerate(statuses) if rank != self._rooms.rank_group.rank)
        elsewhere = frozenset().union(*(status.active for status in others))
        # Clients may have been lost since this rank told the others what it has.
        lost = statuses[self._rooms.rank_group.rank].masked_tokens - self._queue.schedule.masked_tokens
        micro_batches = self._queue.start(num_micro_batches, time.monotonic(), limits, elsewhere)
        manifests = self._service.plans.pop(window).manifests
        self._micro_batches.begin(window, micro_batches, manifests, masked_tokens)
        self._rooms.masked_counts.begin(manifests)
        self._micro_batches.tally.lost_masked_tokens += lost
        self._rooms.influence.begin(masked_tokens)
        self._rooms.inbox.begin()
        clients = self._service.start_alone(window, manifests) if trains_alone else self._queue.schedule.participants
        exchange = self._rooms.strategy.exchange_after(window)
        if exchange != "nothing":
            masked = self._rooms.masked_counts.behind_updates(clients, self._rooms.strategy.least_weight)
            self._rooms.exchange.expect(window, masked, exchange == "weights")

    def _wait(self) -> None:
        """Wait for a result of the device, or else for an event."""
        if self._micro_batches.has_pending_sends:
            self._micro_batches.send_finished(wait=True)
            return
        with self._rooms.trace.span("wait"):
            self._service.wait()

    def _step(self, window: int, lost_masked_tokens: int) -> bool:
        """Step the body; with the client model first, where both are clipped by one norm.

        Returns False, with nothing moved, if a client is lost that the run waits for.
        """
        tally = self._micro_batches.tally
        tally.lost_masked_tokens += lost_masked_tokens
        tally.loss_sum += self._rooms.inbox.loss_sum
        tally.masked_tokens += self._rooms.inbox.masked_tokens
        alone = self._rooms.inbox.reports.take()
        self._rooms.influence.losses(self._rooms.inbox.losses | alone.losses)
        tally.loss_sum += alone.loss_sum
        tally.tokens += alone.tokens
        tally.masked_tokens += alone.masked_tokens
        tally.lost_masked_tokens += alone.lost_masked_tokens
        held_norm = self._update_norm(window) if self._rooms.service.holds_updates else 0.0
        if self._waits and not self._rolls_back_to_checkpoint and self._is_broken():
            self._rooms.engine.drop_gradients()
            self._rooms.influence.take()
            return False
        norm = held_norm if self._optimizer.gradient_clipping > 0 else 0.0
        started = time.monotonic()
        with self._busy("step", window=window):
            scale = self._rooms.engine.step(self._optimizer.learning_rate(window, self._run.windows), norm)
        tally.step_seconds += time.monotonic() - started
        if self._rooms.engine.lost_gradient:
            tally.lost_masked_tokens += tally.masked_tokens
            self._rooms.membership.lose_gradient(window)
        self._service.commit(window, scale)
        self._rooms.commit_elsewhere(window, scale)
        return True

    def _is_broken(self) -> bool:
        """A client of any rank, or the aggregator of another party, is missing from the window."""
        return any(self._rooms.gathered(bool(self._rooms.membership.absent or self._rooms.lost_elsewhere), bool))

    def _await_reports(self, window: int) -> None:
        """Wait until each client that trains the window by itself has, or is gone."""
        if not self._rooms.inbox.reports.awaited:
            return
        with self._rooms.trace.span("wait for clients", window=window):
            while self._rooms.inbox.reports.awaited:
                self._service.attend()

    def _update_norm(self, window: int) -> float:
        """The norm of the client model's gradient, once each client has sent it or is gone."""
        with self._rooms.trace.span("wait for updates", window=window):
            while window not in self._service.norms and not self._rooms.lost_elsewhere:
                self._service.attend()
        return self._service.norms.get(window, 0.0)

    @contextmanager
    def _busy(self, what: str, **details: Any) -> Iterator[None]:
        """Stop the clients' clocks while the rank computes or waits for other ranks."""
        started = time.monotonic()
        with self._rooms.trace.span(what, **details):
            yield
        self._queue.deadlines.stop_clocks(time.monotonic() - started)

    def _demand(self) -> Demand:
        times = self._queue.deadlines.answer_times
        return Demand(
            activations_seconds=times.farthest("activations") if times else 0.0,
            gradient_seconds=times.farthest("gradient") if times else 0.0,
            service_seconds=self._micro_batches.service_seconds,
            affordable=self._rooms.engine.affordable_in_flight(),
        )

    def _take_tally(self) -> Tally:
        tally = self._micro_batches.take_tally()
        seconds = self._rooms.time.take()
        tally.seconds = sum(seconds.values())
        tally.wait_seconds, tally.rank_wait_seconds = seconds.get("clients", 0.0), seconds.get("ranks", 0.0)
        tally.saving_seconds = seconds.get("saving", 0.0)
        tally.evaluation_seconds = seconds.get("evaluating", 0.0)
        tally.bounded = self._rooms.membership.take_bounded()
        tally.recompiles = self._rooms.engine.take_recompiles()
        up, down, tally.update_bytes_down, held_out_down = self._rooms.outbox.take_bytes()
        held_out_up = self._rooms.inbox.held_out.take_bytes()
        tally.evaluation_bytes = held_out_up + held_out_down
        tally.update_bytes_up = self._rooms.inbox.update_bytes - self._update_bytes_told
        self._update_bytes_told = self._rooms.inbox.update_bytes
        tally.bytes_up = up - tally.update_bytes_up - held_out_up
        tally.bytes_down = down - tally.update_bytes_down - held_out_down
        return tally


def _lost_elsewhere(statuses: Sequence[RankStatus]) -> str:
    """Why the aggregator of another party is gone, if any rank says that it is."""
    return next((status.lost_elsewhere for status in statuses if status.lost_elsewhere), "")


def _too_few_clients(left: int, clients: ClientsSection, statuses: Sequence[RankStatus], saved: int) -> str:
    problems = [problem for status in statuses for problem in status.problems]
    resumable = f"saved up to window {saved}: start the clients again and add --resume"
    hint = resumable if saved > 0 else "nothing was saved yet"
    return (
        f"{'; '.join(problems) or 'clients were lost'}; {left} of {clients.expected} clients left, "
        f"the run needs {clients.required} (clients.minimum); {hint}"
    )
