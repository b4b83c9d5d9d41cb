"""The clients of one rank: active, suspended or gone, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedbert_ds.federation.update_exchange import UpdateExchange
from fedbert_ds.server.inbox import Inbox
from fedbert_ds.server.network.outbox import Outbox
from fedbert_ds.server.queue.deadlines import Question
from fedbert_ds.server.queue.pipeline_queue import PipelineQueue
from fedbert_ds.server.remote_exchange import RemoteExchange
from fedbert_ds.wire import fedbert_pb2 as pb


class Membership:
    """Tells every room of a rank when a client joins, is suspended or leaves.

    One call tells them all. `revoke(client)` withdraws a client's right to open another stream.
    """

    def __init__(
        self,
        queue: PipelineQueue,
        exchange: UpdateExchange | RemoteExchange,
        inbox: Inbox,
        outbox: Outbox,
        revoke: Callable[[str], None],
    ) -> None:
        self._queue = queue
        self._exchange = exchange
        self._inbox = inbox
        self._outbox = outbox
        self._revoke = revoke
        self._told = 0
        self.problems: list[str] = []
        """Every problem with clients, a sentence each, in order."""

    def join(self, client: str, now: float) -> None:
        """A client opened its stream."""
        self._queue.join(client, now)

    def disconnect(self, client: str) -> None:
        """A client's stream ended. Does nothing for a client that is gone already."""
        if self._queue.is_connected(client):
            self.problems.append(f"client {client} disconnected")
            self._leave(client)

    def refuse(self, client: str, reason: str) -> None:
        """End a client's part in the run and tell it the reason."""
        self.problems.append(reason)
        self._outbox.close(client, pb.ServerMessage(refused=pb.Refused(reason=reason)))
        self._leave(client)

    def expire(self, client: str) -> None:
        """End the part of a client that was silent for `clients.silence_timeout`."""
        seconds = f"{self._queue.deadlines.silence_timeout:.0f} s (clients.silence_timeout)"
        self.refuse(client, f"client {client} was silent for {seconds}")

    def suspend(self, client: str, micro_batches: Sequence[tuple[int, int]]) -> None:
        """Go on without a late client until it answers.

        `micro_batches` are its skipped pieces, as (window, micro-batch).
        """
        windows = self._exchange.forget(client)
        for window in windows:
            self._queue.deadlines.cancel(client, Question("update", window))
        left_out = "".join(f"; its update of window {window} is left out" for window in windows)
        self.problems.append(f"client {client} is late: windows go on without it until it answers{left_out}")
        self._inbox.drop_activations(client)
        by_window: dict[int, list[int]] = {}
        for window, micro_batch in micro_batches:
            by_window.setdefault(window, []).append(micro_batch)
        for window, skipped in by_window.items():
            message = pb.Skipped(window=window, micro_batches=skipped)
            self._outbox.send(client, pb.ServerMessage(skipped=message))

    def take_new_problems(self) -> tuple[str, ...]:
        """Problems since the last call."""
        new = tuple(self.problems[self._told :])
        self._told = len(self.problems)
        return new

    def _leave(self, client: str) -> None:
        self._queue.lose(client)
        self._exchange.forget(client)
        self._inbox.drop(client)
        self._revoke(client)
