"""One rank's window loop, in step with the other ranks: gather, save, train a window."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fedbert_ds.config import ClientsSection, OptimizerSection, RunSection
from fedbert_ds.errors import RunError
from fedbert_ds.server.contract import RankStatus, Tally
from fedbert_ds.server.network.events import POLL_SECONDS, Connected
from fedbert_ds.server.queue.deadlines import Question
from fedbert_ds.server.queue.decisions import Backward, Forward, Step
from fedbert_ds.server.queue.in_flight import Demand, InFlightLimits, in_flight_limits
from fedbert_ds.server.rooms import Rooms

OnWindow = Callable[[int, Sequence[RankStatus], float], None]
"""(finished window, statuses of all ranks, seconds of the window)"""


class RankServer:
    """Trains on one rank. `train` returns the window before which it stopped, the same on all."""

    def __init__(
        self,
        rooms: Rooms,
        run: RunSection,
        clients: ClientsSection,
        optimizer: OptimizerSection,
        limits: InFlightLimits | None,
        first_window: int,
    ) -> None:
        self._rooms = rooms
        self._queue, self._service, self._micro_batches = rooms.queue, rooms.service, rooms.micro_batches
        self._run, self._clients, self._optimizer = run, clients, optimizer
        self._fixed_limits = limits
        """Micro-batches in flight by the run file. None: from measurements."""
        self._first_window = first_window
        self._update_bytes_told = 0
        self.clients: frozenset[str] = frozenset()
        """Connected clients of all ranks at the last gathering."""

    def connect(self, reference: bytes | None, watch: Callable[[], None]) -> None:
        """Wait until every client seated here has opened its stream; give each the reference, if
        any, to begin with.

        `reference` is None where clients resume from states of their own. `watch` runs while
        waiting; it raises for a local client process that died. Raises RunError after
        `clients.join_timeout` seconds.
        """
        seated = self._rooms.seated
        deadline = time.monotonic() + self._clients.join_timeout
        while self._queue.clients != seated:
            event = self._service.next_event(POLL_SECONDS)
            if isinstance(event, Connected) and reference is not None:
                self._service.send_reference(event.client, reference)
            self._service.dispatch(event)
            watch()
            if time.monotonic() > deadline:
                missing = ", ".join(sorted(seated - self._queue.clients))
                raise RunError(f"{missing} joined but opened no stream; is server.advertise reachable from there?")

    def train(self, on_window: OnWindow, save: Callable[[int], None]) -> int:
        """Run windows until the last one, a stop request, or too few clients.

        `save(window)` writes the state before `window`; all ranks call it. Raises RunError, on
        every rank, when fewer than `clients.required` are left; earlier checkpoints stay.
        """
        window = saved = self._first_window
        started = time.monotonic()
        while True:
            statuses = self._gather(window)
            self.clients = frozenset().union(*(status.clients for status in statuses))
            if window > self._first_window:
                on_window(window - 1, statuses, time.monotonic() - started)
            started = time.monotonic()
            is_over = window == self._run.windows or any(status.stop for status in statuses)
            if len(self.clients) < self._clients.required:
                raise RunError(_too_few_clients(len(self.clients), self._clients, statuses, saved))
            if window > saved and (is_over or window % self._run.save_every == 0):
                save(window)
                saved = window
            if is_over:
                return window
            self._train_window(window, statuses)
            window += 1

    def _gather(self, window: int) -> list[RankStatus]:
        """Wait until this rank's next window is planned, then exchange statuses with all ranks."""
        is_last = window == self._run.windows
        with self._rooms.trace.span("wait for plan", window=window):
            # Clients answer only once their updates are combined, and a running window counts their
            # silence. A rank that stops takes part in the combining too: the others wait for it.
            while not (
                self._rooms.exchange.is_done(window - self._rooms.staleness)
                and (self._queue.schedule.is_planned or is_last or self._rooms.stop.requested)
            ):
                self._service.attend()
        if is_last or self._rooms.stop.requested:
            # Count all bytes of the run. In earlier windows some may count in the next window.
            self._rooms.outbox.settle()
        status = RankStatus(
            num_micro_batches=self._queue.schedule.num_micro_batches,
            masked_tokens=self._queue.schedule.masked_tokens,
            demand=self._demand(),
            clients=self._queue.clients,
            stop=self._rooms.stop.requested,
            problems=tuple(self._rooms.membership.problems),
            # Nobody sees the status before the first window.
            new_problems=self._rooms.membership.take_new_problems() if window > self._first_window else (),
            tally=self._take_tally(),
        )
        with self._busy("gather", window=window):
            return self._rooms.rank_group.gather(status)

    def _train_window(self, window: int, statuses: Sequence[RankStatus]) -> None:
        """Train a planned window, from its start to the body's step."""
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
                        arrived = [self._rooms.inbox.take_activations(micro_batch, piece.client) for piece in pieces]
                        self._micro_batches.forward(forward, arrived)
                case Backward(micro_batch, pieces) as backward:
                    with self._busy("backward", micro_batch=micro_batch):
                        clients = [piece.client for piece in pieces]
                        gradients = {client: self._rooms.inbox.take_gradient(micro_batch, client) for client in clients}
                        self._micro_batches.backward(backward, gradients)
                case Step(_, lost_masked_tokens):
                    self._micro_batches.end()
                    self._service.await_answers(self._rooms.exchange.awaited(window), Question("update", window))
                    self._step(window, lost_masked_tokens)
                    return
                case decision:
                    self._service.carry_out(decision)

    def _start(self, window: int, statuses: Sequence[RankStatus]) -> None:
        """Begin a planned window, in step with the other ranks."""
        limits = self._fixed_limits or in_flight_limits(status.demand for status in statuses)
        masked_tokens = sum(status.masked_tokens for status in statuses)
        num_micro_batches = max(1, *(status.num_micro_batches for status in statuses))
        others = (status for rank, status in enumerate(statuses) if rank != self._rooms.rank_group.rank)
        is_alone = not any(status.num_micro_batches for status in others)
        micro_batches = self._queue.start(num_micro_batches, time.monotonic(), limits, is_alone)
        self._micro_batches.begin(window, micro_batches, self._service.plans.pop(window).manifests, masked_tokens)
        self._rooms.inbox.begin()
        exchange = self._rooms.strategy.exchange_after(window)
        if exchange != "nothing":
            self._rooms.exchange.expect(window, self._queue.schedule.participants, exchange == "weights")

    def _wait(self) -> None:
        """Wait for a result of the device, or else for an event."""
        if self._micro_batches.has_pending_sends:
            self._micro_batches.send_finished(wait=True)
            return
        started = time.monotonic()
        with self._rooms.trace.span("wait"):
            self._service.wait()
        self._micro_batches.tally.wait_seconds += time.monotonic() - started

    def _step(self, window: int, lost_masked_tokens: int) -> None:
        """Step the body; with the client model first, where both are clipped by one norm."""
        tally = self._micro_batches.tally
        tally.lost_masked_tokens += lost_masked_tokens
        tally.loss_sum += self._rooms.inbox.loss_sum
        tally.masked_tokens += self._rooms.inbox.masked_tokens
        norm = self._update_norm(window) if self._rooms.service.holds_updates else 0.0
        started = time.monotonic()
        with self._busy("step", window=window):
            scale = self._rooms.engine.step(self._optimizer.learning_rate(window, self._run.windows), norm)
        tally.busy_seconds += time.monotonic() - started
        self._service.commit(window, scale)
        self._rooms.commit_elsewhere(window, scale)

    def _update_norm(self, window: int) -> float:
        """The norm of the client model's gradient, once each client has sent it or is gone."""
        started = time.monotonic()
        with self._rooms.trace.span("wait for updates", window=window):
            while window not in self._service.norms:
                self._service.attend()
        self._micro_batches.tally.wait_seconds += time.monotonic() - started
        return self._service.norms[window]

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
        up, down, tally.update_bytes_down = self._rooms.outbox.take_bytes()
        tally.update_bytes_up = self._rooms.inbox.update_bytes - self._update_bytes_told
        self._update_bytes_told = self._rooms.inbox.update_bytes
        tally.bytes_up = up - tally.update_bytes_up
        tally.bytes_down = down - tally.update_bytes_down
        return tally


def _too_few_clients(left: int, clients: ClientsSection, statuses: Sequence[RankStatus], saved: int) -> str:
    problems = [problem for status in statuses for problem in status.problems]
    hint = f"saved up to window {saved}: start the clients again and add --resume" if saved else "nothing was saved yet"
    return (
        f"{'; '.join(problems) or 'clients were lost'}; {left} of {clients.expected} clients left, "
        f"the run needs {clients.required} (clients.minimum); {hint}"
    )
