"""A rank's service to its clients beside the body: events in, plans, credit and updates out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from torch import Tensor

from fedbert_ds.errors import WireError
from fedbert_ds.federation.aggregator import Aggregator
from fedbert_ds.federation.averaging import global_norm
from fedbert_ds.federation.client_update import update_chunks
from fedbert_ds.federation.reference import reference_chunks
from fedbert_ds.federation.update_exchange import UpdateExchange
from fedbert_ds.server.inbox import Inbox
from fedbert_ds.server.membership import Membership
from fedbert_ds.server.network.decoding import Decoded, DecodedEvent
from fedbert_ds.server.network.events import POLL_SECONDS, Connected, Disconnected, JoinAsked, reply
from fedbert_ds.server.network.outbox import Outbox
from fedbert_ds.server.queue.deadlines import Question
from fedbert_ds.server.queue.decisions import Decision, Expire, Open, Plan, Suspend
from fedbert_ds.server.queue.pipeline_queue import PipelineQueue
from fedbert_ds.server.remote_exchange import RemoteExchange
from fedbert_ds.telemetry.trace import Trace
from fedbert_ds.wire import fedbert_pb2 as pb

COMBINING_POLL_SECONDS = 0.002
"""Longest wait for an event while updates are being combined: no event marks their end."""


class ClientService:
    """Serves the clients of one rank. `attend` does what is due and waits a little if nothing is.

    `take_event(seconds)` returns the rank's next event. A client that breaks the protocol is
    refused alone. Without an aggregator here, `exchange` is that of another party's.
    """

    def __init__(
        self,
        queue: PipelineQueue,
        inbox: Inbox,
        exchange: UpdateExchange | RemoteExchange,
        membership: Membership,
        outbox: Outbox,
        take_event: Callable[[float], DecodedEvent | None],
        trace: Trace,
        aggregator: Aggregator | None,
        update_codec: str,
        compressed: bool,
        holds_updates: bool = False,
    ) -> None:
        self._queue = queue
        self._inbox = inbox
        self._exchange = exchange
        self._membership = membership
        self._outbox = outbox
        self._take_event = take_event
        self._trace = trace
        self._aggregator = aggregator
        self._update_codec = update_codec
        self._compressed = compressed
        self.holds_updates = holds_updates
        """Combined updates wait until the rank has stepped; `norms` has theirs."""
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
        self.dispatch(self.next_event(COMBINING_POLL_SECONDS if self._exchange.is_combining else POLL_SECONDS))

    def take_in(self) -> None:
        """Take in every event that has arrived."""
        while self.dispatch(self.next_event(0)):
            pass

    def next_event(self, timeout: float) -> DecodedEvent | None:
        """The next event; None after `timeout` seconds. Raises errors of the encoding thread."""
        self._outbox.check()
        return self._take_event(timeout)

    def dispatch(self, event: DecodedEvent | None) -> bool:
        """Take one event in. False for None."""
        match event:
            case None:
                return False
            case JoinAsked(hello, answer):
                reason = f"client {hello.client[:100]}: this rank takes no joins; the run has its clients"
                reply(answer, WireError(reason))
            case Connected(client):
                self._membership.join(client, time.monotonic())
            case Disconnected(client):
                self._membership.disconnect(client)
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
            self._membership.refuse(client, str(error))
        if (combined := self._exchange.poll()) is not None:
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
        assert self._aggregator is not None
        self._aggregator.apply(window, tensors)

        def messages() -> Iterator[pb.ServerMessage]:
            chunks = update_chunks(window, tensors.items(), 0.0, self._update_codec, compressed=self._compressed)
            for chunk in chunks:
                yield pb.ServerMessage(update=chunk)

        # Suspended clients too: they take up training where the others are.
        self._outbox.send_coded(sorted(self._queue.clients), messages)

    def send_reference(self, client: str, reference: bytes) -> None:
        """Send the client model that a client begins with, a safetensors file."""
        self._outbox.send_coded([client], lambda: reference_chunks(reference))

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
        if self._aggregator is not None:
            self._aggregator.close()
        finish = pb.Finish(reason=reason, complete=complete)
        for client in self._queue.clients:
            self._outbox.close(client, pb.ServerMessage(finish=finish))
        self._outbox.settle()

    def settle(self) -> None:
        """Send what is pending, such as the reason of a refusal. What cannot be sent is dropped."""
        with suppress(Exception):  # it was raised before, or another error is under way
            self._outbox.settle()

    def _receive(self, client: str, message: pb.ClientMessage, tensor: Tensor | WireError | None) -> None:
        now = time.monotonic()
        self._queue.reactivate(client, now)
        if not self._inbox.receive(client, message, tensor, now):
            self._tell_plan(client, message.manifest.window, [])
        kind = message.WhichOneof("body")
        if kind in ("activations", "gradient"):
            self._trace.end(kind, client, micro_batch=getattr(message, kind).micro_batch)

    def _tell_plan(self, client: str, window: int, pieces: Sequence[pb.Piece]) -> None:
        plan = pb.Plan(window=window, pieces=pieces, next_window=self._queue.next_window)
        self._outbox.send(client, pb.ServerMessage(plan=plan))
