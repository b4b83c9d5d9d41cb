"""Client updates of one rank where another party combines them: who is awaited, what is decided.

No tensor passes here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from torch import Tensor

from fedbert_ds.errors import WireError
from fedbert_ds.federation.client_update import Tensors
from fedbert_ds.server.queue.deadlines import SLOWEST_UPLOAD, Deadlines, Question
from fedbert_ds.server.remote_aggregator import RemoteAggregator
from fedbert_ds.wire import fedbert_pb2 as pb


class RemoteExchange:
    """Stands in for an UpdateExchange: the same calls."""

    def __init__(self, remote: RemoteAggregator, deadlines: Deadlines) -> None:
        self._remote = remote
        self._deadlines = deadlines
        self._windows: dict[int, set[str]] = {}
        """Windows that are not combined yet, and clients whose updates they lack."""
        self._combined: list[int] = []
        """Combined windows that `poll` has not returned."""
        self.norms: dict[int, float] = {}
        """Norms of combined updates, by window."""
        self._bounded: list[tuple[str, float]] = []
        remote.hear_of_updates(self._hear, self._drop_all)

    def expect(self, window: int, masked: Mapping[str, int], average: bool) -> None:
        """Accept updates of this window from these clients; windows come in order. `masked` are the
        masked tokens behind each one's.
        """
        self._windows[window] = set(masked)
        clients = sorted(masked)
        counts = [masked[client] for client in clients]
        expect = pb.Expect(window=window, average=average, clients=clients, masked=counts)
        self._remote.send(pb.Order(expect=expect))

    def awaited(self, window: int) -> frozenset[str]:
        """Clients that have not delivered their update of this window."""
        return frozenset(self._windows.get(window, ()))

    def deliver(self, window: int, client: str, decode: Callable[[], Tensors]) -> None:
        """Raises WireError: updates go to the aggregator."""
        raise WireError(f"client {client}: its update of window {window} belongs to the aggregator")

    def forget(self, client: str) -> list[int]:
        """Await nothing more from a client; returns the windows combined without it."""
        left_out = [window for window, awaited in self._windows.items() if client in awaited]
        for window in left_out:
            self._windows[window].remove(client)
        self._remote.send(pb.Order(drop=pb.Drop(client=client)))
        return left_out

    def take_unsound(self) -> list[tuple[str, BaseException]]:
        """Clients that the aggregator has parted with, and why, since the last call."""
        self._remote.take_reports()
        return [*self._remote.take_lost_clients()]

    def poll(self) -> tuple[int, dict[str, Tensor]] | None:
        """(window, nothing) once the next window is combined, or None."""
        self._remote.take_reports()
        return (self._combined.pop(0), {}) if self._combined else None

    def take_bounded(self) -> list[tuple[str, float]]:
        """Clients whose update was too large, and how many times what may count, since the last
        call.
        """
        bounded, self._bounded = self._bounded, []
        return bounded

    def is_done(self, before: int) -> bool:
        """Every window below `before` is combined."""
        return all(window >= before for window in [*self._windows, *self._combined])

    @property
    def is_idle(self) -> bool:
        """No window is being combined."""
        return not self._windows and not self._combined

    @property
    def is_combining(self) -> bool:
        """A report is due, which is no event: whoever waits must look often."""
        return not self.is_idle or self._remote.is_awaited

    def close(self) -> None:
        """Nothing to do: the aggregator's `finish` ends the conversation."""

    def _hear(self, report: pb.Report) -> None:
        match report.WhichOneof("body"):
            case "delivered":
                window, client = report.delivered.window, report.delivered.client
                if report.delivered.whole:
                    self._deadlines.answered(client, Question("update", window), time.monotonic())
                    self._windows.get(window, set()).discard(client)
                else:
                    seconds = report.delivered.bytes / SLOWEST_UPLOAD
                    self._deadlines.progress(client, Question("update", window), time.monotonic(), seconds)
            case "combined":
                window = report.combined.window
                if self._windows.pop(window, None) is not None:
                    self.norms[window] = report.combined.norm
                    self._bounded += zip(report.combined.bounded, report.combined.times, strict=False)
                    self._combined.append(window)

    def _drop_all(self) -> None:
        self._windows.clear()
        self._combined.clear()
        self.norms.clear()
