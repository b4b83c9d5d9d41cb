"""Client updates of one rank where another party combines them: who is awaited, what is decided.

No tensor passes here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from torch import Tensor

from fedbert_ds.errors import AggregatorLost, ConnectionLost, WireError
from fedbert_ds.federation.client_update import ClientUpdate
from fedbert_ds.server.queue.deadlines import Deadlines, Question
from fedbert_ds.wire import fedbert_pb2 as pb


class Line(Protocol):
    """The conversation with the aggregator."""

    def send(self, order: pb.Order) -> None:
        """Queue an order."""
        ...

    def take(self, timeout: float = 0.0) -> pb.Report | None:
        """The oldest report, waiting up to `timeout` s. Raises AggregatorLost when no more come."""
        ...

    def opened_again(self) -> bytes:
        """Look for a lost aggregator; what it answers once it is back, for every rank's `reopen`,
        and nothing until then. Raises what speaks against its return.
        """
        ...

    def reopen(self, opened: bytes, window: int) -> None:
        """Dial it again, for a run that goes on before `window`."""
        ...


class RemoteExchange:
    """Stands in for an UpdateExchange: the same calls, and what only another party must be told.

    Once the aggregator is `lost` nothing is awaited of it, and its loss is that of every client
    here: what clients have sent there is gone.
    """

    def __init__(self, line: Line, deadlines: Deadlines, first_window: int = 0) -> None:
        self._line = line
        self._deadlines = deadlines
        self._first_window = first_window
        """Before which the aggregator's run begins."""
        self.lost = ""
        """Why the aggregator is gone, if it is."""
        self._clients: set[str] = set()
        """Admitted, and not parted with."""
        self._windows: dict[int, set[str]] = {}
        """Windows that are not combined yet, and clients whose updates they lack."""
        self._combined: list[int] = []
        """Combined windows that `poll` has not returned."""
        self._lost: list[tuple[str, BaseException]] = []
        self._is_awaiting = False
        self._saved: set[int] = set()
        self._undone = 0
        """The last time that windows were undone at the aggregator."""
        self._has_admitted = False
        self.norms: dict[int, float] = {}
        """Norms of combined updates, by window."""
        self.result = ""
        """The aggregator's file of the final client model, once that is written."""

    # -- as an UpdateExchange ----------------------------------------------------------------------

    def expect(self, window: int, clients: Iterable[str], average: bool) -> None:
        """Accept updates of this window from these clients; windows come in order."""
        self._windows[window] = set(clients)
        expect = pb.Expect(window=window, average=average, clients=sorted(self._windows[window]))
        self._send(pb.Order(expect=expect))

    def awaited(self, window: int) -> frozenset[str]:
        """Clients that have not delivered their update of this window."""
        return frozenset(self._windows.get(window, ()))

    def deliver(self, window: int, client: str, decode: Callable[[], ClientUpdate]) -> None:
        """Raises WireError: updates go to the aggregator."""
        raise WireError(f"client {client}: its update of window {window} belongs to the aggregator")

    def forget(self, client: str) -> list[int]:
        """Await nothing more from a client; returns the windows combined without it."""
        left_out = [window for window, awaited in self._windows.items() if client in awaited]
        for window in left_out:
            self._windows[window].remove(client)
        self._send(pb.Order(drop=pb.Drop(client=client)))
        return left_out

    def take_unsound(self) -> list[tuple[str, BaseException]]:
        """Clients that the aggregator has parted with, and why, since the last call."""
        self._take_reports()
        lost, self._lost = self._lost, []
        return lost

    def poll(self) -> tuple[int, dict[str, Tensor]] | None:
        """(window, nothing) once the next window is combined, or None."""
        self._take_reports()
        return (self._combined.pop(0), {}) if self._combined else None

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
        return not self.is_idle or self._is_awaiting

    def close(self) -> None:
        """Nothing to do; `finish` ends the conversation."""

    # -- what another party must be told -----------------------------------------------------------

    def admit(self, sessions: Mapping[str, str], timeout: float) -> None:
        """Let clients open their streams to the aggregator, also ones that come back; the first
        call begins the aggregator's run. Waits until they may; WireError after `timeout` seconds.
        """
        self._clients |= sessions.keys()
        clients = [pb.Admission(client=client, session=session) for client, session in sorted(sessions.items())]
        self._has_admitted = False
        self._send(pb.Order(admit=pb.Admit(window=self._first_window, clients=clients)))
        deadline = time.monotonic() + timeout
        while not self._has_admitted and not self.lost:
            if time.monotonic() > deadline:
                raise WireError(f"the aggregator admitted no clients in {timeout:.0f} s; look at its output")
            self._take_reports(timeout=0.2)
        # What is said of a client before it is admitted is about its last stay.
        self._lost = [(client, error) for client, error in self._lost if client not in sessions]

    def begin(self, client: str, attempt: int, with_reference: bool) -> None:
        """The client's stream to this rank is open, or windows were undone for time `attempt`: it
        begins, with the reference or a state of its own.
        """
        begin = pb.BeginClient(client=client, reference=with_reference, attempt=attempt)
        self._send(pb.Order(begin=begin))

    def part_with(self, client: str) -> None:
        """The client has left the run."""
        self._clients.discard(client)
        self._send(pb.Order(drop=pb.Drop(client=client, gone=True)))

    def commit(self, window: int, scale: float) -> None:
        """The body steps in `window`, its gradient shrunk by `scale`: the reference moves, too."""
        self._send(pb.Order(commit=pb.Commit(window=window, scale=scale)))

    def undo(self, window: int, attempt: int, attend: Callable[[], None]) -> None:
        """The windows from this one on have not happened, for time `attempt`; every rank says so.
        `attend` runs until the aggregator has forgotten them.
        """
        self._send(pb.Order(undo=pb.Undo(window=window, attempt=attempt)))
        self._await(lambda: self._undone >= attempt, attend)
        self.norms.clear()

    def save(self, window: int, attend: Callable[[], None]) -> bool:
        """Have the reference before `window` written; `attend` runs until it is on disk. False if
        the aggregator is lost before that.
        """
        self._saved.discard(window)
        self._send(pb.Order(save=pb.Save(window=window)))
        self._await(lambda: window in self._saved, attend)
        return window in self._saved

    def conclude(self, window: int, complete: bool) -> None:
        """Have the final client model written."""
        self._send(pb.Order(conclude=pb.Conclude(window=window, complete=complete)))

    def await_result(self, attend: Callable[[], None]) -> str:
        """The aggregator's file of the final client model; `attend` runs until it is written.
        Raises AggregatorLost.
        """
        self._await(lambda: bool(self.result), attend)
        if not self.result:
            raise AggregatorLost(f"{self.lost}; start it and this run again, both with --resume")
        return self.result

    def finish(self, reason: str, complete: bool) -> None:
        """The run is over, also for the aggregator."""
        self._send(pb.Order(finish=pb.Finish(reason=reason, complete=complete)))

    # -- a lost aggregator -------------------------------------------------------------------------

    def give_up(self, reason: str) -> None:
        """The aggregator is lost, to this rank or another: await nothing more of it."""
        if self.lost:
            return
        self.lost = reason
        self._windows.clear()
        self._combined.clear()
        self._lost = [(client, ConnectionLost(reason)) for client in sorted(self._clients)]

    def opened_again(self) -> bytes:
        """As a Line's."""
        return self._line.opened_again()

    def reopen(self, opened: bytes, window: int) -> None:
        """The aggregator is back, and goes on before `window`. All ranks call it."""
        self._line.reopen(opened, window)
        self._first_window = window
        self.lost = ""
        self.norms.clear()

    def _send(self, order: pb.Order) -> None:
        # It may be lost to another rank only: then what this one says is of a run that is over.
        if not self.lost:
            self._line.send(order)

    def _await(self, is_so: Callable[[], bool], attend: Callable[[], None]) -> None:
        self._is_awaiting = True
        while not is_so() and not self.lost:
            attend()
        self._is_awaiting = False

    def _take_reports(self, timeout: float = 0.0) -> None:
        """Take every report in that has come; wait up to `timeout` s for the first."""
        try:
            while not self.lost and (report := self._line.take(timeout)) is not None:
                timeout = 0.0
                self._take(report)
        except AggregatorLost as error:
            self.give_up(str(error))

    def _take(self, report: pb.Report) -> None:
        match report.WhichOneof("body"):
            case "admitted":
                self._has_admitted = True
            case "delivered":
                window, client = report.delivered.window, report.delivered.client
                if report.delivered.whole:
                    self._deadlines.answered(client, Question("update", window), time.monotonic())
                    self._windows.get(window, set()).discard(client)
                else:
                    self._deadlines.progress(client, Question("update", window), time.monotonic())
            case "lost":
                kind = ConnectionLost if report.lost.may_return else WireError
                self._lost.append((report.lost.client, kind(report.lost.reason)))
            case "combined":
                window = report.combined.window
                if self._windows.pop(window, None) is not None:
                    self.norms[window] = report.combined.norm
                    self._combined.append(window)
            case "saved":
                self._saved.add(report.saved.window)
            case "concluded":
                self.result = report.concluded.file or "client model"
            case "undone":
                self._undone = report.undone.attempt
