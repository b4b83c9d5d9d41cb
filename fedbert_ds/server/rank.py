"""One rank's training loop: do what the queue decides, exchange client halves, save, end in step with other ranks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fedbert_ds.config import RunConfig
from fedbert_ds.errors import RunError, WireError
from fedbert_ds.federation.averaging import combine
from fedbert_ds.federation.client_update import ClientUpdate, update_chunks
from fedbert_ds.federation.strategy import exchange_after
from fedbert_ds.federation.update_exchange import UpdateExchange
from fedbert_ds.seeding import stable_seed
from fedbert_ds.server.admission import Seat
from fedbert_ds.server.body.device_work import DeviceWork
from fedbert_ds.server.body.engine import BodyEngine
from fedbert_ds.server.body.packed_input import packed_input
from fedbert_ds.server.contract import RankStatus, Tally
from fedbert_ds.server.inbox import Inbox, Shapes
from fedbert_ds.server.network.events import (
    POLL_SECONDS,
    Connected,
    Disconnected,
    Event,
    JoinAsked,
    RankEndpoint,
    Received,
    reply,
)
from fedbert_ds.server.network.outbox import Outbox
from fedbert_ds.server.queue.deadlines import Deadlines
from fedbert_ds.server.queue.decisions import Backward, Decision, Expire, Forward, Open, Plan, Skip, Step
from fedbert_ds.server.queue.in_flight import INITIAL_IN_FLIGHT, Demand, InFlightLimits, in_flight_limits
from fedbert_ds.server.queue.packing import Piece, pack
from fedbert_ds.server.queue.pipeline_queue import PipelineQueue
from fedbert_ds.server.rank_group import RankGroup
from fedbert_ds.telemetry.trace import Trace
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import encode
from fedbert_ds.wire.messages import Manifest

COMBINING_POLL_SECONDS = 0.002
"""The same while halves are being combined: no event says that they are."""


class StopFlag(Protocol):
    """Something that may ask the run to save and end."""

    requested: bool


@dataclass
class _Flight:
    """A micro-batch between its forward and its backward."""

    pieces: tuple[Piece, ...]
    values_per_piece: list[int]
    """Rows of `activations` each piece brought: its tokens, or its distinct rows."""


class RankServer:
    """Trains on one rank. `train` returns the window it stopped before; the same on every rank."""

    def __init__(
        self,
        config: RunConfig,
        shapes: Shapes,
        engine: BodyEngine,
        endpoint: RankEndpoint,
        rank_group: RankGroup,
        seats: Mapping[str, Seat],
        first_window: int,
        stop: StopFlag,
        trace: Trace,
        next_event: Callable[[float], Event | None] | None = None,
    ) -> None:
        self._config = config
        self._shapes = shapes
        self._engine = engine
        self._endpoint = endpoint
        self._outbox = Outbox(endpoint)
        self._take_event = next_event or endpoint.next_event
        self._rank_group = rank_group
        self._seats = {client: seat for client, seat in seats.items() if seat.rank == rank_group.rank}
        self._first_window = first_window
        fixed = config.window.micro_batches_in_flight
        first = INITIAL_IN_FLIGHT if fixed == "auto" else fixed
        self._depth = InFlightLimits(first, first)
        # With a fixed order nothing may depend on the clock.
        self._deadlines = None if config.window.order == "fixed" else Deadlines()
        self._queue = PipelineQueue(
            first,
            partial(
                pack,
                capacity=config.window.tokens_per_micro_batch,
                clients_together=config.window.clients_per_micro_batch,
            ),
            config.window.order,
            engine.lockstep_forwards,
            config.clients.silence_timeout,
            first_window,
            config.run.windows,
            windows_ahead=max(1, config.federation.staleness),
            deadlines=self._deadlines,
        )
        self._stop = stop
        self._trace = trace
        self._exchange = UpdateExchange(self._combined)
        self._inbox = Inbox(self._queue, self._exchange, shapes, config.wire, self._seats)
        self._plans: dict[int, Plan] = {}
        self._manifests: dict[str, Manifest] = {}
        self._numbers: dict[int, int] = {}
        """Micro-batches of the running window by their place in it."""
        self._asked: dict[tuple[str, str, int], float] = {}
        """When (what, client, micro-batch) was asked for; for the timeline."""
        self._masked_tokens = 0
        self._service_seconds = 0.0
        self._flights: dict[int, _Flight] = {}
        self._leaving: deque[tuple[DeviceWork, Callable[[Tensor], bool]]] = deque()
        """What the device makes, and what sends it; true if it was for somebody."""
        self._tally = Tally()
        self._problems: list[str] = []
        self._told = 0
        self._half_bytes_up_taken = 0
        self.clients: frozenset[str] = frozenset()
        """Connected clients of all ranks, as of the last gathering."""
        self.client_figures: dict[str, pb.Saved] = {}
        """The last Saved of each client of this rank: peak memory and FLOP per token."""

    # -- the run --------------------------------------------------------------------------------------------------

    def connect(self, initial_half: Mapping[str, Tensor] | None, watch: Callable[[], None]) -> None:
        """Wait until every client seated at this rank has opened its stream; give each its first weights, if any.

        `watch` is called while waiting and may raise: a local client process that died.
        """
        deadline = time.monotonic() + self._config.clients.join_timeout
        while self._queue.clients != set(self._seats):
            event = self._next_event(POLL_SECONDS)
            if isinstance(event, Connected) and initial_half is not None:
                self._send_half([event.client], initial_half, self._first_window)
            self._dispatch(event)
            watch()
            if time.monotonic() > deadline:
                missing = ", ".join(sorted(set(self._seats) - self._queue.clients))
                raise RunError(f"{missing} joined but opened no stream; is server.advertise reachable from there?")

    def train(self, on_window: Callable[[int, Sequence[RankStatus], float], None], folder: Path) -> int:
        """Run windows until the last one, a stop request, or too few clients.

        `on_window(window, statuses, seconds)` sees every finished window's statuses of all ranks. Raises RunError, on
        every rank, when fewer than `clients.required` are left; what was saved before stays.
        """
        saved = self._first_window
        window = self._first_window
        started = time.monotonic()
        while True:
            statuses = self._gather(window)
            self.clients = frozenset().union(*(status.clients for status in statuses))
            if window > self._first_window:
                on_window(window - 1, statuses, time.monotonic() - started)
            started = time.monotonic()
            is_over = window == self._config.run.windows or any(status.stop for status in statuses)
            if len(self.clients) < self._config.clients.required:
                raise RunError(self._too_few_clients(statuses, saved))
            if window > saved and (is_over or window % self._config.run.save_every == 0):
                self._save(folder, window)
                saved = window
            if is_over:
                return window
            self._train_window(window, statuses)
            window += 1

    def _too_few_clients(self, statuses: Sequence[RankStatus], saved: int) -> str:
        problems = [problem for status in statuses for problem in status.problems]
        clients = self._config.clients
        hint = (
            f"saved up to window {saved}: start the clients again and add --resume"
            if saved
            else "nothing was saved yet"
        )
        return (
            f"{'; '.join(problems) or 'clients were lost'}; {len(self.clients)} of {clients.expected} clients left, "
            f"the run needs {clients.required} (clients.minimum); {hint}"
        )

    def collect_half(self, window: int) -> dict[str, Tensor]:
        """The client half for the merged checkpoint, on every rank.

        `synchronous` halves are equal, so the first client's is taken; in `parallel` mode all are averaged, by masked
        tokens.
        """
        wanted = self.clients if self._config.federation.mode == "parallel" else set(sorted(self.clients)[:1])
        mine = sorted(wanted & self._queue.clients)
        self._inbox.expect_collected(window)
        self._exchange.progress()
        for client in mine:
            self._outbox.send(client, pb.ServerMessage(update_request=pb.UpdateRequest(window=window)))
        while set(mine) & self._queue.clients - set(self._inbox.collected):
            self._attend()
            if self._exchange.quiet_seconds > self._config.clients.silence_timeout:
                for client in set(mine) & self._queue.clients - set(self._inbox.collected):
                    self._expire(client)
        halves = [self._inbox.collected[client] for client in mine if client in self._inbox.collected]
        if not any(self._rank_group.gather(len(halves))):
            raise RunError(
                f"no client was left to hand over its half; window {window} is saved: start the clients again and "
                "add --resume"
            )
        return combine(halves, self._shapes.half, average=True, group=self._rank_group.group)

    def finish(self, reason: str, complete: bool) -> None:
        """Tell this rank's clients that the run is over; when it is not `complete` it may be resumed."""
        self._exchange.close()
        finish = pb.Finish(reason=reason, complete=complete)
        for client in self._queue.clients:
            self._outbox.close(client, pb.ServerMessage(finish=finish))
        self._outbox.settle()

    def settle(self) -> None:
        """Hand over what is still to be sent, such as why a client was refused; what cannot be is dropped."""
        with suppress(Exception):  # it was raised before, or another error is on its way
            self._outbox.settle()

    # -- a window -------------------------------------------------------------------------------------------------

    def _gather(self, window: int) -> list[RankStatus]:
        """Wait until this rank's next window is planned, then exchange statuses with all ranks."""
        is_last = window == self._config.run.windows
        with self._trace.span("wait for plan", window=window):
            # Clients cannot answer before their halves are combined, and a window that runs counts their silence. A
            # rank that stops still has its part in that: the others wait for it.
            while not (
                self._exchange.is_done(window - self._config.federation.staleness)
                and (self._queue.planned or is_last or self._stop.requested)
            ):
                self._attend()
        if is_last or self._stop.requested:
            self._outbox.settle()  # so that the run's bytes are all counted; before, a window's may go to the next one
        status = RankStatus(
            num_micro_batches=self._queue.num_micro_batches,
            masked_tokens=self._queue.masked_tokens,
            demand=self._demand(),
            clients=self._queue.clients,
            stop=self._stop.requested,
            problems=tuple(self._problems),
            new_problems=tuple(self._problems[self._told :]),
            tally=self._take_tally(),
        )
        if window > self._first_window:
            # The status before the first window is shown to nobody.
            self._told = len(self._problems)
        with self._busy("gather", window=window):
            return self._rank_group.gather(status)

    def _demand(self) -> Demand:
        deadlines = self._deadlines
        return Demand(
            activations_seconds=deadlines.farthest("activations") if deadlines else 0.0,
            gradient_seconds=deadlines.farthest("gradient") if deadlines else 0.0,
            service_seconds=self._service_seconds,
            affordable=self._engine.affordable_in_flight(),
        )

    def _train_window(self, window: int, statuses: Sequence[RankStatus]) -> None:
        """From the start of a planned window to the body's step."""
        if self._config.window.micro_batches_in_flight == "auto":
            self._depth = in_flight_limits(status.demand for status in statuses)
        self._masked_tokens = sum(status.masked_tokens for status in statuses)
        num_micro_batches = max(1, *(status.num_micro_batches for status in statuses))
        is_alone = not any(
            status.num_micro_batches for rank, status in enumerate(statuses) if rank != self._rank_group.rank
        )
        micro_batches = self._queue.start(num_micro_batches, time.monotonic(), *self._depth, is_alone)
        self._numbers = {micro_batch: number for number, micro_batch in enumerate(micro_batches)}
        self._manifests = {manifest.client: manifest for manifest in self._plans.pop(window).manifests}
        self._inbox.begin()
        exchange = exchange_after(self._config.federation, window)
        if exchange != "nothing":
            self._exchange.expect(window, self._queue.participants, exchange == "weights")
        while True:
            while self._dispatch(self._next_event(0)):
                pass
            self._hand_out_halves()
            self._send_what_is_done()
            match self._queue.decide(time.monotonic()):
                case None if self._leaving:
                    self._send_what_is_done(wait=True)
                case None:
                    waiting_since = time.monotonic()
                    with self._trace.span("wait"):
                        self._dispatch(self._next_event(self._patient_seconds))
                    self._tally.wait_seconds += time.monotonic() - waiting_since
                case Forward() as forward:
                    with self._busy("forward", micro_batch=forward.micro_batch):
                        self._forward(window, forward.micro_batch, forward.pieces)
                case Backward() as backward:
                    with self._busy("backward", micro_batch=backward.micro_batch):
                        self._backward(window, backward)
                case Step(_, lost_masked_tokens):
                    while self._leaving:
                        self._send_what_is_done(wait=True)
                    with self._busy("step", window=window):
                        self._step(window, lost_masked_tokens)
                    return
                case other:
                    self._carry_out(other)

    def _attend(self) -> None:
        """While the body has nothing to do: take in what comes, plan and give credit ahead, pass halves on."""
        self._dispatch(self._next_event(self._patient_seconds))
        self._hand_out_halves()
        while (decision := self._queue.decide(time.monotonic())) is not None:
            self._carry_out(decision)

    def _carry_out(self, decision: Decision) -> None:
        """Decisions that leave the body alone."""
        match decision:
            case Plan() as plan:
                self._plans[plan.window] = plan
                pieces: dict[str, list[pb.Piece]] = {manifest.client: [] for manifest in plan.manifests}
                for mb in plan.micro_batches:
                    for piece in mb.pieces:
                        span = {"first_sequence": piece.first_sequence, "num_sequences": piece.num_sequences}
                        pieces[piece.client].append(pb.Piece(micro_batch=mb.index, **span))
                for client in [*pieces, *sorted(plan.passed_over)]:
                    self._tell_plan(client, plan.window, pieces.get(client, []))
            case Open(window, micro_batch, pieces_):
                for piece in pieces_:
                    self._asked["activations", piece.client, micro_batch] = time.monotonic()
                    credit = pb.Open(window=window, micro_batch=micro_batch)
                    self._outbox.send(piece.client, pb.ServerMessage(open=credit))
            case Skip(client, micro_batches):
                self._skip(client, micro_batches)
            case Expire(client):
                self._expire(client)
            case _:
                raise AssertionError(f"{decision} needs a running window")

    def _tell_plan(self, client: str, window: int, pieces: Sequence[pb.Piece]) -> None:
        plan = pb.Plan(window=window, pieces=pieces, next_window=self._queue.next_window)
        self._outbox.send(client, pb.ServerMessage(plan=plan))

    def _skip(self, client: str, micro_batches: Sequence[tuple[int, int]]) -> None:
        left_out = "".join(f"; its half of window {window} is left out" for window in self._exchange.forget(client))
        self._problems.append(f"client {client} is late: windows go on without it until it answers{left_out}")
        self._inbox.drop_activations(client)
        by_window: dict[int, list[int]] = {}
        for window, micro_batch in micro_batches:
            by_window.setdefault(window, []).append(micro_batch)
        for window, skipped in by_window.items():
            message = pb.Skipped(window=window, micro_batches=skipped)
            self._outbox.send(client, pb.ServerMessage(skipped=message))

    def _forward(self, window: int, micro_batch: int, pieces: tuple[Piece, ...]) -> None:
        arrived = [self._inbox.take_activations(micro_batch, piece.client) for piece in pieces]
        # Neither the order of micro-batches nor their numbers, which go on from window to window, may change dropout.
        place = self._rank_group.rank, self._numbers[micro_batch]
        seed = stable_seed("body dropout", self._config.run.seed, window, *place)
        if pieces:
            body_input = packed_input(pieces, arrived, self._manifests, seed)
        else:
            body_input = self._engine.dummy_input(self._shapes.activation_width, self._shapes.is_rows_cut, seed)
        work = self._engine.forward(micro_batch, body_input)
        self._tally.forwards += 1
        self._tally.tokens += sum(piece.tokens for piece in pieces)
        self._tally.dummy_micro_batches += not pieces
        self._flights[micro_batch] = _Flight(pieces, [len(item.values) for item in arrived])
        self._leaving.append((work, partial(self._send_hidden, window, micro_batch, pieces)))

    def _send_hidden(self, window: int, micro_batch: int, pieces: tuple[Piece, ...], hidden: Tensor) -> bool:
        wire, masked_tokens = self._config.wire, self._masked_tokens

        def message(rows: Tensor) -> Iterator[pb.ServerMessage]:
            frame = encode(rows, wire.hidden_states, compressed=wire.is_compressed)
            place = {"window": window, "micro_batch": micro_batch}
            yield pb.ServerMessage(hidden=pb.Hidden(**place, values=frame, masked_tokens=masked_tokens))

        for piece, rows in zip(pieces, hidden.split([piece.masked for piece in pieces]), strict=True):
            self._asked["gradient", piece.client, micro_batch] = time.monotonic()
            self._outbox.send_coded([piece.client], partial(message, rows))
        return bool(pieces)

    def _backward(self, window: int, backward: Backward) -> None:
        micro_batch = backward.micro_batch
        flight = self._flights.pop(micro_batch)
        present = {piece.client for piece in backward.pieces}
        width = self._shapes.hidden_width
        gradients = [
            self._inbox.take_gradient(micro_batch, piece.client)
            if piece.client in present
            else torch.zeros(piece.masked, width)
            for piece in flight.pieces
        ]
        hidden_gradient = torch.cat(gradients) if gradients else torch.zeros(0, width)
        work = self._engine.backward(micro_batch, hidden_gradient, backward.is_last)
        self._tally.backwards += 1
        self._leaving.append((work, partial(self._send_input_gradients, window, micro_batch, flight, present)))

    def _send_input_gradients(
        self, window: int, micro_batch: int, flight: _Flight, present: set[str], gradient: Tensor
    ) -> bool:
        if not flight.pieces:
            return False
        wire = self._config.wire

        def message(rows: Tensor) -> Iterator[pb.ServerMessage]:
            frame = encode(rows, wire.gradients, compressed=wire.is_compressed)
            yield pb.ServerMessage(
                input_gradient=pb.InputGradient(window=window, micro_batch=micro_batch, values=frame)
            )

        for piece, rows in zip(flight.pieces, gradient.split(flight.values_per_piece), strict=True):
            if piece.client in present:
                self._outbox.send_coded([piece.client], partial(message, rows))
        return True

    def _send_what_is_done(self, wait: bool = False) -> None:
        """Send results that the device has finished; with `wait` the oldest one, however long it takes."""
        while self._leaving and (wait or self._leaving[0][0].is_done):
            work, send = self._leaving.popleft()
            tensor, seconds = work.result()
            # A dummy is no work.
            self._tally.busy_seconds += seconds if send(tensor) else 0.0
            wait = False

    def _step(self, window: int, lost_masked_tokens: int) -> None:
        if real := self._tally.forwards - self._tally.dummy_micro_batches:
            self._service_seconds = self._tally.busy_seconds / real
        started = time.monotonic()
        self._engine.step(self._config.optimizer.learning_rate(window, self._config.run.windows))
        self._tally.busy_seconds += time.monotonic() - started
        self._tally.lost_masked_tokens += lost_masked_tokens
        self._tally.loss_sum += self._inbox.loss_sum
        self._tally.masked_tokens += self._inbox.masked_tokens
        self._exchange.due(window)

    @property
    def _patient_seconds(self) -> float:
        return COMBINING_POLL_SECONDS if self._exchange.is_combining else POLL_SECONDS

    # -- client halves --------------------------------------------------------------------------------------------

    def _combined(self, halves: list[ClientUpdate], average: bool) -> dict[str, Tensor]:
        shapes = {name: self._shapes.half[name] for name in sorted(self._shapes.exchanged)}
        return combine(halves, shapes, average=average, group=self._rank_group.update_group)

    def _hand_out_halves(self) -> None:
        """Send what was combined since the last call; drop clients whose half does not come, or is not sound."""
        for client, error in self._exchange.take_unsound():
            if not isinstance(error, WireError):
                raise error
            self._refuse(client, str(error))
        if (combined := self._exchange.poll()) is not None:
            window, tensors = combined
            # Clients that were passed over too: they take up training where the others are.
            self._send_half(sorted(self._queue.clients), tensors, window, self._shapes.exchange_codec)
        if self._exchange.late and self._exchange.quiet_seconds > self._config.clients.silence_timeout:
            for client in self._exchange.late:
                self._expire(client)

    def _finish_exchanges(self) -> None:
        """Every client has, or is about to receive, what windows so far have combined."""
        with self._trace.span("wait for halves"):
            while not self._exchange.is_idle:
                self._attend()

    def _send_half(
        self, clients: Sequence[str], tensors: Mapping[str, Tensor], window: int, codec: str = "fp32"
    ) -> None:
        def chunks() -> Iterator[pb.ServerMessage]:
            compressed = self._config.wire.is_compressed
            for chunk in update_chunks(window, tensors.items(), weight=0.0, codec=codec, compressed=compressed):
                yield pb.ServerMessage(update=chunk)

        self._outbox.send_coded(clients, chunks)

    # -- saving ---------------------------------------------------------------------------------------------------

    def _save(self, folder: Path, window: int) -> None:
        """Clients save their halves, ranks the body; the checkpoint counts only once everything is on disk."""
        self._finish_exchanges()
        self._inbox.expect_saved(window)
        for client in self._queue.clients:
            self._outbox.send(client, pb.ServerMessage(save=pb.Save(window=window)))
        self._engine.save(folder, window)
        deadline = time.monotonic() + self._config.clients.silence_timeout
        while missing := self._queue.clients - set(self._inbox.saved):
            self._attend()
            if time.monotonic() > deadline:
                for client in missing:
                    self._expire(client)
        self.client_figures.update(self._inbox.saved)
        self._rank_group.complete_checkpoint(folder, window)

    # -- events ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _busy(self, what: str, **details: Any) -> Iterator[None]:
        """While the rank computes or waits for other ranks, nobody's silence counts."""
        started = time.monotonic()
        with self._trace.span(what, **details):
            yield
        self._queue.stop_clocks(time.monotonic() - started)

    def _dispatch(self, event: Event | None) -> bool:
        """Take one event in; False if there was none. A client that breaks the protocol is dropped alone."""
        match event:
            case None:
                return False
            case JoinAsked(hello, answer):
                reply(
                    answer, WireError(f"client {hello.client[:100]}: this rank takes no joins; the run has its clients")
                )
            case Connected(client):
                self._queue.join(client, time.monotonic())
            case Disconnected(client):
                if self._queue.is_connected(client):
                    self._problems.append(f"client {client} disconnected")
                    self._forget(client)
            case Received(client, message, decoded) if self._queue.is_connected(client):
                try:
                    self._receive(client, message, decoded)
                except WireError as error:
                    self._refuse(client, str(error))
        return True

    def _next_event(self, timeout: float) -> Event | None:
        self._outbox.check()
        return self._take_event(timeout)

    def _receive(self, client: str, message: pb.ClientMessage, decoded: Tensor | WireError | None) -> None:
        now = time.monotonic()
        self._queue.heard(client, now)
        if not self._inbox.receive(client, message, decoded):
            self._tell_plan(client, message.manifest.window, [])
        kind = message.WhichOneof("body")
        if kind in ("activations", "gradient"):
            micro_batch = getattr(message, kind).micro_batch
            asked = self._asked.pop((kind, client, micro_batch), None)
            if asked is not None:
                self._trace.add(kind, asked, now, track=client, micro_batch=micro_batch)

    def _expire(self, client: str) -> None:
        reason = (
            f"client {client} was silent for {self._config.clients.silence_timeout:.0f} s (clients.silence_timeout)"
        )
        self._refuse(client, reason)

    def _refuse(self, client: str, reason: str) -> None:
        self._problems.append(reason)
        self._outbox.close(client, pb.ServerMessage(refused=pb.Refused(reason=reason)))
        self._forget(client)

    def _forget(self, client: str) -> None:
        self._queue.lose(client)
        self._exchange.forget(client)
        self._endpoint.revoke(client)
        self._inbox.drop(client)

    def _take_tally(self) -> Tally:
        tally, self._tally = self._tally, Tally()
        up, down, tally.averaging_bytes_down = self._outbox.take_bytes()
        tally.averaging_bytes_up = self._inbox.half_bytes - self._half_bytes_up_taken
        self._half_bytes_up_taken = self._inbox.half_bytes
        tally.bytes_up = up - tally.averaging_bytes_up
        tally.bytes_down = down - tally.averaging_bytes_down
        return tally
