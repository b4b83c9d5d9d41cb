"""One run at the aggregator: orders of ranks and updates of clients in, combined updates out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedbert_ds.aggregator.folder import AggregatorFolder
from fedbert_ds.aggregator.guests import Beginning, Guests, RunEndpoint
from fedbert_ds.aggregator.reference_messages import ReferenceMessages
from fedbert_ds.aggregator.roll_back import RollBack
from fedbert_ds.aggregator.update_inbox import Shapes, UpdateInbox
from fedbert_ds.aggregator.window_updates import Committed, WindowUpdates
from fedbert_ds.config import RunConfig
from fedbert_ds.errors import RunError, WireError
from fedbert_ds.federation.aggregator import Aggregator
from fedbert_ds.federation.averaging import NobodyDelivered
from fedbert_ds.federation.client_update import ClientUpdate, Tensors, update_chunks
from fedbert_ds.federation.combining import Combiner, OneProcess
from fedbert_ds.federation.server_optimizer import rule_of
from fedbert_ds.federation.strategy import strategy_of_run
from fedbert_ds.server.network.outbox import Outbox
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.messages import cut_to_json


@dataclass(frozen=True)
class ClientModel:
    """The first client model, and what is written beside the last one."""

    weights: Mapping[str, Tensor]
    """fp32 by name."""
    exchanged: Shapes
    """Shapes of the tensors in updates."""
    handed_over: Shapes
    """Shapes of the tensors that clients hand over for the result."""
    model_config: Any
    """transformers' config of the whole model."""


class AggregatedRun:
    """Owns the client model of one run. Used from one thread; `attend` does what is due.

    A client that breaks the protocol is refused alone, and its rank told. Every other error is the
    run's: `order` and `attend` raise WireError for an order that does not fit, RunError for a
    checkpoint that cannot be read.
    """

    def __init__(
        self,
        config: RunConfig,
        model: ClientModel,
        sessions: list[str],
        endpoint: RunEndpoint,
        folder: AggregatorFolder,
    ) -> None:
        self._config = config
        self._model = model
        self._endpoint, self._outbox = endpoint, Outbox(endpoint)
        self._folder = folder
        self._strategy = strategy_of_run(config)
        self._aggregator = Aggregator(
            model.weights, self._strategy, config.optimizer, config.run.windows, rule_of(config.federation)
        )
        # The order of a rank's own sums, whose result must be the same bit for bit.
        self._shapes = {name: model.exchanged[name] for name in sorted(model.exchanged)}
        self._guests = Guests(endpoint, sessions)
        self._combiner = Combiner(
            config.federation, self._shapes, OneProcess(self._guests.by_rank), self._aggregator.common
        )
        clips = self._strategy.clips_together and config.optimizer.gradient_clipping > 0
        self._updates = WindowUpdates(self._combined, len(sessions), config.federation.staleness, clips)
        self._inbox = UpdateInbox(model.exchanged, model.handed_over, self._strategy.update_codec)
        self._has_begun = False
        self._roll_back = RollBack(len(sessions))
        self._reference = ReferenceMessages(shares_moments=not self._strategy.halves_are_personal)
        self._collected: dict[str, Tensors] = {}
        self._concluding: tuple[pb.Conclude, float] | None = None
        """The result is being collected, until this time."""
        self._totals: dict[str, int] = {}
        """Masked tokens of each client in the whole run."""
        self._is_concluded = False
        """The result is written, so clients leave as they like."""
        self.finish: pb.Finish | None = None
        """The ranks' last order, once it has come."""

    @property
    def is_busy(self) -> bool:
        """An update is being combined, which no event ends."""
        return self._updates.is_combining

    # -- from ranks --------------------------------------------------------------------------------

    def order(self, sender: str, order: pb.Order) -> None:
        """Carry out a rank's order."""
        rank = self._guests.rank(sender)
        if rank is None:
            return  # of a run that is over
        kind = order.WhichOneof("body")
        if kind in ("commit", "save", "conclude", "finish") and rank != 0:
            raise WireError(f"rank {rank}: an order of kind {kind} is rank 0's")
        match kind:
            case "admit":
                self._admit(rank, order.admit)
            case "begin":
                self._begin(order.begin)
            case "expect":
                self._expect(rank, order.expect)
            case "drop":
                self._updates.forget(order.drop.client)
                if order.drop.gone and order.drop.client in self._guests.here:
                    self._part_with(order.drop.client, "the server has ended this client's part in the run")
            case "undo":
                self._undo(rank, order.undo)
            case "commit":
                self._updates.commit(order.commit.window, order.commit.scale)
            case "save":
                self._save(order.save.window)
            case "conclude":
                self._conclude(order.conclude)
            case "finish":
                self.finish = order.finish
            case _:
                raise WireError(f"rank {rank}: an order of kind {kind} was not expected")

    def _admit(self, rank: int, admit: pb.Admit) -> None:
        if not self._has_begun:
            self._folder.begin_at(admit.window)
            if admit.window:
                load_saved(self._folder, admit.window, self._aggregator, self._combiner)
        self._has_begun = True
        self._guests.admit(rank, admit)

    def _expect(self, rank: int, expect: pb.Expect) -> None:
        masked = counted(expect.clients, expect.masked, f"rank {rank}: updates of window {expect.window}")
        here = {client: count for client, count in masked.items() if client in self._guests.here}
        self._updates.expect(rank, expect.window, expect.average, here)

    def _begin(self, begin: pb.BeginClient) -> None:
        if self._roll_back.waits(begin):
            return
        own_state = None if begin.reference else self._aggregator.reference().version
        self._guests.let_begin(begin.client, Beginning(begin.attempt, own_state))
        self._begin_clients()

    def _undo(self, rank: int, undo: pb.Undo) -> None:
        """Forget the windows from this one on, with the last rank that says so."""
        if not self._roll_back.add(rank, undo.attempt):
            return
        self._updates.undo(undo.window)
        if self._aggregator.reference().version > undo.window:
            load_saved(self._folder, undo.window, self._aggregator, self._combiner)
        for client in self._guests.under_way:
            self._inbox.drop(client)
        self._guests.tell_all_ranks(pb.Report(undone=pb.Undone(attempt=undo.attempt)))
        for begin in self._roll_back.undone(self._guests.under_way):
            self._begin(begin)

    def _save(self, window: int) -> None:
        if not self._updates.is_idle:
            raise WireError(f"window {window} is to be saved while an earlier one is being combined")
        self._folder.save(window, self._aggregator.reference(), self._combiner.state())
        self._guests.tell_rank(0, pb.Report(saved=pb.SavedReference(window=window)))

    def _conclude(self, conclude: pb.Conclude) -> None:
        if self._strategy.result_is_reference:
            self._write_result(conclude.window, self._aggregator.reference().weights)
            return
        self._totals = counted(conclude.clients, conclude.masked, "the run's clients")
        self._inbox.collect(conclude.window)
        request = pb.ServerMessage(update_request=pb.UpdateRequest(window=conclude.window))
        for client in sorted(self._guests.under_way):
            self._outbox.send(client, request)
        self._concluding = conclude, time.monotonic() + self._config.clients.silence_timeout

    # -- from clients ------------------------------------------------------------------------------

    def connected(self, client: str) -> None:
        """A client has opened its stream."""
        self._guests.connect(client)
        self._begin_clients()

    def _begin_clients(self) -> None:
        """Give clients that begin the reference; those that have its state must not be behind."""
        for client, (attempt, own_state) in self._guests.take_beginnings().items():
            reference = self._aggregator.reference()
            if own_state is not None and own_state != reference.version:
                self._lose(client, f"client {client} came to the aggregator after a window was over", may_return=True)
                continue
            begin = pb.Begin(attempt=attempt, window=reference.version, reference=own_state is None)
            self._outbox.send(client, pb.ServerMessage(begin=begin))
            if own_state is None:
                self._outbox.send_coded([client], self._reference.of(reference))

    def receive(self, client: str, message: pb.ClientMessage) -> None:
        """Take a client's message; one that does not fit ends its part in the run."""
        if client not in self._guests.here or not self._roll_back.hears(client, message):
            return
        try:
            arrived = self._inbox.receive(client, message)
            if arrived.decode is not None and arrived.is_model:
                self._collected[client] = arrived.decode()
            elif arrived.decode is not None:
                self._updates.deliver(client, arrived.window, arrived.decode)
        except WireError as error:
            self._lose(client, str(error))
            return
        if not arrived.is_model:
            delivered = pb.Delivered(window=arrived.window, client=client, whole=arrived.decode is not None)
            delivered.bytes = len(message.update.payload)
            self._guests.tell_rank_of(client, pb.Report(delivered=delivered))

    def disconnected(self, client: str) -> None:
        """A client's stream has ended."""
        was_here = client in self._guests.connected
        self._guests.connected.discard(client)
        if was_here and not self._is_concluded:
            self._lose(client, f"client {client} lost its connection to the aggregator", may_return=True)

    def _lose(self, client: str, reason: str, may_return: bool = False) -> None:
        """A client is gone, and its rank does not know yet; whether it may join again."""
        lost = pb.Lost(client=client, reason=reason, may_return=may_return)
        self._guests.tell_rank_of(client, pb.Report(lost=lost))
        self._updates.forget(client)
        self._part_with(client, reason)

    def _part_with(self, client: str, reason: str) -> None:
        self._guests.part_with(client)
        self._inbox.drop(client)
        self._roll_back.forget(client)
        self._outbox.close(client, pb.ServerMessage(refused=pb.Refused(reason=reason)))

    # -- out ---------------------------------------------------------------------------------------

    def attend(self) -> None:
        """Combine, apply and send what is due. Raises errors of the threads."""
        self._outbox.check()
        for client, error in self._updates.take_unsound():
            if not isinstance(error, WireError):
                raise error
            if client in self._guests.here:
                self._lose(client, str(error))
        if (combined := self._updates.take_combined()) is not None:
            window, norm = combined
            self._guests.tell_combined(window, norm, dict(self._combiner.take_bounded()))
        if (committed := self._updates.take_committed()) is not None:
            self._hand_out(committed)
        if self._concluding is not None:
            conclude, deadline = self._concluding
            if self._collected.keys() >= self._guests.under_way or time.monotonic() > deadline:
                self._concluding = None
                if not self._collected:
                    raise RunError("no client was left to hand over its half; start all again with --resume")
                halves = {
                    client: ClientUpdate(half, float(max(1, self._totals.get(client, 0))))
                    for client, half in self._collected.items()
                }
                reference = self._aggregator.reference().weights
                result = self._combiner.result(halves, self._model.handed_over, reference)
                self._write_result(conclude.window, reference | result)

    def close(self, report: pb.Report | None, finish: pb.Finish) -> None:
        """Part with every rank, with one last report, and with every client."""
        for client in sorted(self._guests.connected):
            self._endpoint.close(client, pb.ServerMessage(finish=finish))
        if report is not None:
            self._guests.part_with_ranks(report)
        self._updates.close()
        self._aggregator.close()

    def _combined(self, updates: Mapping[str, ClientUpdate], average: bool) -> dict[str, Tensor]:
        """In the exchange's thread."""
        try:
            result = self._combiner.combine(updates, average)
        except NobodyDelivered:
            return self._aggregator.unchanged(self._shapes)
        return self._aggregator.answer(result) if average else result

    def _hand_out(self, committed: Committed) -> None:
        """Move the reference by a committed update, and give clients the same."""
        window, combined = committed
        self._aggregator.apply(window, combined)
        codec, compressed = self._strategy.update_codec, self._config.wire.is_compressed

        def messages() -> Iterator[pb.ServerMessage]:
            for chunk in update_chunks(window, combined.items(), codec, compressed=compressed):
                yield pb.ServerMessage(update=chunk)

        self._outbox.send_coded(sorted(self._guests.under_way), messages)

    def _write_result(self, window: int, weights: Mapping[str, Tensor]) -> None:
        self._folder.write_result(weights, self._model.model_config, cut_to_json(self._config.cut), window)
        self._is_concluded = True
        self._guests.tell_all_ranks(pb.Report(concluded=pb.Concluded(file=str(self._folder.client_model))))


def load_saved(folder: AggregatorFolder, window: int, aggregator: Aggregator, combiner: Combiner) -> None:
    """Go on from what was saved before `window`. RunError if that cannot be read."""
    reference, votes = folder.load(window, aggregator.shapes)
    aggregator.load(reference)
    combiner.load_state(votes)


def counted(clients: Sequence[str], masked: Sequence[int], what: str) -> dict[str, int]:
    """Masked tokens by client. Raises WireError for another number of counts than of clients."""
    if len(clients) != len(masked):
        raise WireError(f"{what}: {len(masked)} counts of masked tokens for {len(clients)} clients")
    return dict(zip(clients, masked, strict=True))
