"""A rank's service to its clients beside the body: events in, plans, credit and updates out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from torch import Tensor

from fedbert_ds.errors import ConnectionLost, WireError
from fedbert_ds.federation.aggregator import Aggregator
from fedbert_ds.federation.averaging import global_norm
from fedbert_ds.federation.client_update import update_chunks
from fedbert_ds.federation.reference import Reference, reference_chunks, to_bytes
from fedbert_ds.federation.update_exchange import UpdateExchange
from fedbert_ds.server.body.health import BodyHealth
from fedbert_ds.server.cursors import Cursors
from fedbert_ds.server.inbox import Inbox
from fedbert_ds.server.membership import Membership
from fedbert_ds.server.network.decoding import Decoded, DecodedEvent
from fedbert_ds.server.network.events import (
    POLL_SECONDS,
    Attached,
    Connected,
    Detached,
    Disconnected,
    JoinAbandoned,
    JoinAsked,
    Knocked,
)
from fedbert_ds.server.network.outbox import Outbox
from fedbert_ds.server.network.sessions import TakeEvent
from fedbert_ds.server.queue.deadlines import Question
from fedbert_ds.server.queue.decisions import Decision, Expire, Open, Plan, Suspend
from fedbert_ds.server.queue.pipeline_queue import PipelineQueue
from fedbert_ds.server.remote_aggregator import RemoteAggregator
from fedbert_ds.server.remote_exchange import RemoteExchange
from fedbert_ds.telemetry.time_account import TimeAccount
from fedbert_ds.telemetry.trace import Trace
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.messages import Manifest
from fedbert_kernels.encoded import Encoded

COMBINING_POLL_SECONDS = 0.002
"""Longest wait for an event while updates are being combined: no event marks their end."""

STOPPING_SECONDS = 20.0
"""How long each answer may take once the run is to save and end: it has minutes, not more."""

EVENTS_AT_ONCE = 256
"""Then the body is looked after, however fast events come."""


class ClientService:
    """Serves the clients of one rank. `attend` does what is due and waits a little if nothing is.

    `take_event(seconds)` returns the next event that counts, `on_join` takes joins among them. A
    client that breaks the protocol is refused alone. `has_state(client, window)` says that a client
    has a state of its own of this window, and begins with it. `exchange` fits the `aggregator`.
    """

    def __init__(
        self,
        queue: PipelineQueue,
        inbox: Inbox,
        exchange: UpdateExchange | RemoteExchange,
        membership: Membership,
        cursors: Cursors,
        outbox: Outbox,
        take_event: TakeEvent,
        on_join: Callable[[JoinAsked | JoinAbandoned], None],
        has_state: Callable[[str, int], bool],
        trace: Trace,
        aggregator: Aggregator | RemoteAggregator,
        update_codec: str,
        compressed: bool,
        account: TimeAccount,
        health: BodyHealth,
        holds_updates: bool = False,
        shares_moments: bool = True,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._queue = queue
        self._inbox = inbox
        self._exchange = exchange
        self._membership = membership
        self._cursors = cursors
        self._outbox = outbox
        self._take_event = take_event
        self._on_join = on_join
        self._has_state = has_state
        self._trace = trace
        self._aggregator = aggregator
        self._update_codec = update_codec
        self._compressed = compressed
        self._account = account
        self._health = health
        self.holds_updates = holds_updates
        """Combined updates wait until the rank has stepped; `norms` has theirs."""
        self._is_stopping = is_stopping
        """The run saves and ends."""
        self._shares_moments = shares_moments
        """A client that begins needs what the reference's optimizer remembers."""
        self.awaits_newcomers = True
        """The next window waits for a client that connects."""
        self.restored: int | None = None
        """The window that the run goes on with as it was saved, while nothing is trained since."""
        self._attempt = 0
        """How often windows were rolled back."""
        self._begins: dict[str, int] = {}
        """Begins of each client that it has not answered."""
        self._rolled_back: set[str] = set()
        """Clients that have not heard of the last time."""
        self._reference: tuple[int, bytes] | None = None
        """The reference's version and bytes, as clients last got them."""
        self.plans: dict[int, Plan] = {}
        """Windows that are planned and have not begun."""
        self.norms: dict[int, float] = {}
        """Norms of combined updates that are held, by window."""
        self._held: dict[int, dict[str, Tensor]] = {}
        """These updates, where they are combined here."""

    def attend(self) -> None:
        """While the body is idle: take events in, plan and give credit ahead, hand updates out."""
        self.wait()
        self.hand_out_updates()
        while (decision := self._queue.decide(time.monotonic())) is not None:
            self.carry_out(decision)

    def wait(self) -> None:
        """Wait a little for one event and take it in."""
        if self._is_stopping():
            self._queue.deadlines.hurry(STOPPING_SECONDS, time.monotonic())
        is_combining = self._exchange.is_combining
        with self._account.charged("ranks" if is_combining else "clients"):
            event = self.next_event(COMBINING_POLL_SECONDS if is_combining else POLL_SECONDS)
        self.dispatch(event)

    def take_in(self) -> None:
        """Take in the events that have arrived; of very many the first ones."""
        for _ in range(EVENTS_AT_ONCE):
            if not self.dispatch(self.next_event(0)):
                return

    def next_event(self, timeout: float) -> DecodedEvent | None:
        """The next event; None after `timeout` seconds. Raises errors of the encoding thread, and
        NotFinite for results of a body that has none that are finite.
        """
        self._outbox.check()
        for client, error in self._outbox.take_unsound():
            self._health.look_into(error)
            if self._queue.is_connected(client):
                self._health.unsound.add(client)
                self._membership.refuse(client, f"client {client}: what it sent makes results that are not finite")
        return self._take_event(timeout)

    def dispatch(self, event: DecodedEvent | None) -> bool:
        """Take one event in. False for None."""
        match event:
            case None:
                return False
            case JoinAsked() | JoinAbandoned():
                self._on_join(event)
            case Connected(client):
                self._rolled_back.discard(client)
                self._begins[client] = 0
                # What an earlier process of this client announced is not asked of the new one.
                self.plans = {window: plan.without(client) for window, plan in self.plans.items()}
                self._health.unsound.discard(client)
                self._membership.join(client, time.monotonic(), self.awaits_newcomers)
                self._begin(client)
            case Detached(client) if self._queue.is_connected(client):
                self._membership.detached.add(client)
            case Knocked(client) if client in self._membership.detached:
                # Its process has ended: nobody has to wait for the connection to come back.
                self._membership.evict(client)
            case Attached(client):
                self._membership.detached.discard(client)
            case Disconnected(client, reason):
                self._membership.disconnect(client, reason)
            case Decoded(client, message, tensor) if self._queue.is_connected(client):
                try:
                    self._receive(client, message, tensor)
                except WireError as error:
                    self._membership.refuse(client, str(error))
        return True

    def carry_out(self, decision: Decision) -> None:
        """Carry out a decision that does not concern the body."""
        match decision:
            case Plan() as plan:
                self.plans[plan.window] = plan
                pieces: dict[str, list[pb.Piece]] = {manifest.client: [] for manifest in plan.manifests}
                for micro_batch in plan.micro_batches:
                    for piece in micro_batch.pieces:
                        span = {"first_sequence": piece.first_sequence, "num_sequences": piece.num_sequences}
                        pieces[piece.client].append(pb.Piece(micro_batch=micro_batch.index, **span))
                if not plan.micro_batches:  # each client trains its whole batch by itself
                    for manifest in plan.manifests:
                        pieces[manifest.client] = [pb.Piece(num_sequences=len(manifest.lengths))]
                for client in [*pieces, *sorted(plan.suspended)]:
                    self._tell_plan(client, plan.window, pieces.get(client, []))
            case Open(window, index, opened):
                for piece in opened:
                    self._trace.begin("activations", piece.client, micro_batch=index)
                    credit = pb.Open(window=window, micro_batch=index)
                    self._outbox.send(piece.client, pb.ServerMessage(open=credit))
            case Suspend(client, skipped):
                self._membership.suspend(client, skipped)
            case Expire(client):
                self._membership.expire(client)
            case _:
                raise AssertionError(f"{decision} needs a running window")

    def hand_out_updates(self) -> None:
        """Send updates combined since the last call; refuse clients whose update is unsound."""
        for client, error in self._exchange.take_unsound():
            if not isinstance(error, WireError):
                raise error
            if self._queue.is_connected(client):
                self._membership.refuse(client, str(error), may_return=isinstance(error, ConnectionLost))
        combined = self._exchange.poll()
        for client, times in self._exchange.take_bounded():
            self._membership.bounded(client, "update", times)
        if combined is not None:
            window, tensors = combined
            if isinstance(self._exchange, RemoteExchange):
                self.norms[window] = self._exchange.norms.pop(window)
            elif self.holds_updates:
                self._held[window], self.norms[window] = tensors, global_norm(tensors)
            else:
                self.send_combined(window, tensors)

    def commit(self, window: int, scale: float) -> None:
        """The body has stepped, its gradient shrunk by `scale`: a held update goes out."""
        self.norms.pop(window, None)
        if (gradients := self._held.pop(window, None)) is not None:
            clipped = {name: gradient * scale for name, gradient in gradients.items()} if scale < 1.0 else gradients
            self.send_combined(window, clipped)

    def send_combined(self, window: int, tensors: Mapping[str, Tensor]) -> None:
        """Give what a window's updates were combined to, fp32 by name, to the aggregator and all
        clients.
        """
        assert isinstance(self._aggregator, Aggregator)
        self._aggregator.apply(window, tensors)
        self._reference = None

        def messages() -> Iterator[pb.ServerMessage]:
            chunks = update_chunks(window, tensors.items(), self._update_codec, compressed=self._compressed)
            for chunk in chunks:
                yield pb.ServerMessage(update=chunk)

        # Suspended clients too: they take up training where the others are.
        self._outbox.send_coded(sorted(self._queue.clients), messages)

    def roll_back(self, window: int) -> None:
        """Tell every client to forget what is under way, and to go on before `window` with the
        half that it had then; with the reference, if a checkpoint was loaded that it has no state
        of.
        """
        self._attempt += 1
        self._rolled_back = set(self._queue.clients)
        self.plans.clear()
        if isinstance(self._aggregator, RemoteAggregator):
            self._aggregator.undo(window, self._attempt, self.attend)
        self.norms.clear()
        self._held.clear()
        for client in sorted(self._rolled_back & self._queue.clients):
            self._begin(client, kept=window if self.restored is None else None)

    def start_alone(self, window: int, manifests: Iterable[Manifest]) -> frozenset[str]:
        """Tell the clients of a window that they may train it by themselves; returns those here."""
        planned = {manifest.client: manifest for manifest in manifests}
        self._inbox.reports.begin(window, planned.values())
        clients = self._queue.active & planned.keys()
        for client in planned.keys() - clients:
            self._inbox.reports.drop(client)  # lost or late since the window was planned
        for client in sorted(clients):
            self._outbox.send(client, pb.ServerMessage(open=pb.Open(window=window)))
        self.await_answers(clients, Question("trained", window))
        return clients

    def await_answers(self, clients: Iterable[str], question: Question) -> None:
        """Start the clocks of a question to these clients. One silent for too long is gone."""
        now = time.monotonic()
        for client in clients:
            self._queue.deadlines.ask(client, question, now)

    def ask(
        self,
        clients: Iterable[str],
        question: Question,
        request: pb.ServerMessage,
        answers: Mapping[str, object],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Send a request and attend until `answers` holds every asked client that is still here.

        `meanwhile` runs once all are asked; its time does not count as silence.
        """
        asked = frozenset(clients)
        for client in sorted(asked):
            self._outbox.send(client, request)
        meanwhile()
        self.await_answers(asked, question)
        while (asked & self._queue.clients) - answers.keys():
            self.attend()

    def finish_exchanges(self) -> None:
        """Attend until the updates of all windows so far are combined and on their way."""
        with self._trace.span("wait for updates"):
            while not self._exchange.is_idle:
                self.attend()

    def finish(self, reason: str, complete: bool) -> None:
        """Tell clients that the run is over. A run that is not `complete` may be resumed."""
        self._exchange.close()
        if isinstance(self._aggregator, Aggregator):
            self._aggregator.close()
        finish = pb.Finish(reason=reason, complete=complete)
        for client in self._queue.clients:
            self._outbox.close(client, pb.ServerMessage(finish=finish))
        self._outbox.settle()

    def settle(self) -> None:
        """Send what is pending, such as the reason of a refusal. What cannot be sent is dropped."""
        with suppress(Exception):  # it was raised before, or another error is under way
            self._outbox.settle()

    def _receive(self, client: str, message: pb.ClientMessage, tensor: Encoded | WireError | None) -> None:
        if message.HasField("begun"):
            if not self._begins.get(client):
                raise WireError(f"client {client}: it has begun, and nobody told it to")
            self._begins[client] -= 1
            if message.begun.attempt == self._attempt:
                self._rolled_back.discard(client)
            return
        if client in self._rolled_back:
            return  # sent before it heard of the last roll-back
        now = time.monotonic()
        self._queue.reactivate(client, now)
        if not self._inbox.receive(client, message, tensor, now):
            self._tell_plan(client, message.manifest.window, [])
        kind = message.WhichOneof("body")
        if kind in ("activations", "gradient") and not message.activations.held_out_lengths:
            self._trace.end(kind, client, micro_batch=getattr(message, kind).micro_batch)

    def _begin(self, client: str, kept: int | None = None) -> None:
        """Tell a client where to go on: with the half that it has of window `kept`, or with a state
        of its own, if it has the one, or with the reference.
        """
        if kept is None and self.restored is not None and self._has_state(client, self.restored):
            kept = self.restored
        reference = None
        if isinstance(self._aggregator, RemoteAggregator):
            self._aggregator.begin(client, self._attempt, with_reference=kept is None)
        elif kept is None:
            reference = self._aggregator.reference()
        cursor = self._cursors.committed.get(client)
        begin = pb.Begin(
            attempt=self._attempt,
            # A reference from elsewhere says itself which window it is of.
            window=reference.version if reference is not None else kept or 0,
            next_window=self._queue.roster.next_window_of(client),
            cursor=pb.Cursor(**cursor) if cursor is not None else None,
            reference=kept is None,
        )
        self._begins[client] = self._begins.get(client, 0) + 1
        self._outbox.send(client, pb.ServerMessage(begin=begin))
        if reference is None:
            return
        if self._reference is None or self._reference[0] != reference.version:
            moments = reference.optimizer if self._shares_moments else {}
            data = to_bytes(Reference(reference.version, reference.weights, moments))
            self._reference = reference.version, data
        _, data = self._reference
        self._outbox.send_coded([client], lambda: reference_chunks(data))

    def _tell_plan(self, client: str, window: int, pieces: Sequence[pb.Piece]) -> None:
        plan = pb.Plan(window=window, pieces=pieces, next_window=self._queue.roster.next_window_of(client))
        self._outbox.send(client, pb.ServerMessage(plan=plan))
