"""The clients of one rank: awaited, active, suspended or gone, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedbert_ds.federation.update_exchange import UpdateExchange
from fedbert_ds.server.cursors import Cursors
from fedbert_ds.server.inbox import Inbox
from fedbert_ds.server.network.outbox import Outbox
from fedbert_ds.server.queue.deadlines import Question
from fedbert_ds.server.queue.pipeline_queue import PipelineQueue
from fedbert_ds.server.remote_exchange import RemoteExchange
from fedbert_ds.wire import fedbert_pb2 as pb

MOST_PROBLEMS = 100
"""That are kept, and told of one window: a client can cause as many as it likes."""


class Membership:
    """Tells every room of a rank when a client joins, is suspended or leaves.

    One call tells them all. `revoke(client)` withdraws a client's right to open another stream.
    With `waits`, no window is planned while a client is away that has a seat here.
    """

    def __init__(
        self,
        queue: PipelineQueue,
        exchange: UpdateExchange | RemoteExchange,
        inbox: Inbox,
        cursors: Cursors,
        outbox: Outbox,
        revoke: Callable[[str], None],
        waits: bool,
    ) -> None:
        self._queue = queue
        self._exchange = exchange
        self._inbox = inbox
        self._cursors = cursors
        self._outbox = outbox
        self._revoke = revoke
        self._waits = waits
        self._new: list[str] = []
        """Problems since the last `take_new_problems`, the first ones."""
        self._more_new = 0
        """How many came after these."""
        self.detached: set[str] = set()
        """Connected clients that have lost their connection and may still come back to it."""
        self.absent: set[str] = set()
        """With `waits`: clients with a seat here that are gone; nothing goes on without them."""
        self.problems: list[str] = []
        """The last problems with clients, a sentence each, in order."""
        self._times_bounded: dict[str, int] = {}
        self._bounded_told = 0

    def join(self, client: str, now: float, is_awaited: bool = True) -> None:
        """A client opened its stream. Windows do not wait for one that comes while they run."""
        self._queue.join(client, now, is_awaited)
        if client in self.absent or not is_awaited:
            self._note(f"client {client} has joined the run that is under way")
        self.absent.discard(client)

    def disconnect(self, client: str, reason: str = "") -> None:
        """A client's stream ended. Does nothing for a client that is gone already."""
        if self._queue.is_connected(client):
            self._note(f"client {client} disconnected" + (f": {reason}" if reason else ""))
            self._leave(client)

    def refuse(self, client: str, reason: str, may_return: bool = False) -> None:
        """End a client's part in the run and tell it the reason, and whether it may join again."""
        self._note(reason)
        refused = pb.Refused(reason=reason, may_return=may_return)
        self._outbox.close(client, pb.ServerMessage(refused=refused))
        self._leave(client)

    def expire(self, client: str) -> None:
        """End the part of a client that was silent for `clients.silence_timeout`."""
        deadlines = self._queue.deadlines
        limit = "while the run stops" if deadlines.is_hurried else "(clients.silence_timeout)"
        reason = f"client {client} was silent for {deadlines.silence_timeout:.0f} s {limit}"
        self.refuse(client, reason, may_return=True)

    def evict(self, client: str) -> None:
        """End the part of a client whose connection is lost, because it joins again.

        It may return: word of who joins comes late to other ranks, and this may be the process that
        joined, which has lost its connection since.
        """
        self.refuse(client, f"client {client} disconnected, and joins again", may_return=True)

    def suspend(self, client: str, micro_batches: Sequence[tuple[int, int]]) -> None:
        """Go on without a late client until it answers.

        `micro_batches` are its skipped pieces, as (window, micro-batch).
        """
        windows = self._exchange.forget(client)
        for window in windows:
            self._queue.deadlines.cancel(client, Question("update", window))
        left_out = "".join(f"; its update of window {window} is left out" for window in windows)
        self._note(f"client {client} is late: windows go on without it until it answers{left_out}")
        self._inbox.leave_out(client, [*windows, *(window for window, _ in micro_batches)])
        self._inbox.drop_activations(client)
        by_window: dict[int, list[int]] = {}
        for window, micro_batch in micro_batches:
            by_window.setdefault(window, []).append(micro_batch)
        for window, skipped in by_window.items():
            message = pb.Skipped(window=window, micro_batches=skipped)
            self._outbox.send(client, pb.ServerMessage(skipped=message))

    def bounded(self, client: str, what: str, times: float) -> None:
        """What a client sent was so many times what may count of it, and was scaled down.

        It is a problem the first time, the tenth, and so on: honest clients never come there.
        """
        count = self._times_bounded[client] = self._times_bounded.get(client, 0) + 1
        if is_power_of_ten(count):
            often = "" if count == 1 else f"; {count} times so far"
            self._note(
                f"client {client}: its {what} was {times:.3g} times what may count (federation.bound), and is scaled "
                f"down{often}"
            )

    def lose_gradient(self, window: int) -> None:
        """The body's gradient of a window was not finite on this rank, whoever's numbers did it."""
        self._note(f"the body's gradient of window {window} was not finite on a rank, and is left out")

    def take_bounded(self) -> int:
        """How often something was scaled down since the last call."""
        total = sum(self._times_bounded.values())
        count, self._bounded_told = total - self._bounded_told, total
        return count

    def take_new_problems(self) -> tuple[str, ...]:
        """Problems since the last call."""
        new = (*self._new, *([f"{self._more_new} more problems with clients"] if self._more_new else []))
        self._new, self._more_new = [], 0
        return new

    def _note(self, problem: str) -> None:
        if len(self._new) < MOST_PROBLEMS:
            self._new.append(problem)
        else:
            self._more_new += 1
        self.problems.append(problem)
        del self.problems[:-MOST_PROBLEMS]

    def _leave(self, client: str) -> None:
        self._queue.lose(client)
        self._exchange.forget(client)
        self._inbox.drop(client)
        self._cursors.forget(client, counts=self._queue.schedule.window_trained_by(client))
        self._revoke(client)
        self.detached.discard(client)
        if self._waits:
            self.absent.add(client)
            self._queue.hold(True)


def is_power_of_ten(count: int) -> bool:
    """Whether a count is 1, 10, 100 and so on: often enough to say something again."""
    return str(count).rstrip("0") == "1"
