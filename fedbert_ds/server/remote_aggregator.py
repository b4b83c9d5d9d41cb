"""What a rank and an aggregator of another party tell each other, and the loss of that party.

No tensor passes here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from fedbert_ds.errors import AggregatorLost, ConnectionLost, WireError
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


class RemoteAggregator:
    """Speaks with the aggregator over a line. Reports of client updates go to who hears of them.

    Once the aggregator is `lost`, to this rank or another, nothing is sent to it or awaited of it.
    Its loss is that of every client here: what clients have sent there is gone. `first_window` is
    the one before which its run begins.
    """

    def __init__(self, line: Line, first_window: int = 0) -> None:
        self._line = line
        self._first_window = first_window
        self.lost = ""
        """Why the aggregator is gone, if it is."""
        self._clients: set[str] = set()
        """Admitted, and not parted with."""
        self._lost_clients: list[tuple[str, WireError]] = []
        self._hear: Callable[[pb.Report], None] = lambda _: None
        self._drop_updates: Callable[[], None] = lambda: None
        self.is_awaited = False
        """A report is due, which is no event: whoever waits must look often."""
        self._saved: set[int] = set()
        self._undone = 0
        """The last time that windows were undone at the aggregator."""
        self._has_admitted = False
        self.result = ""
        """The aggregator's file of the final client model, once that is written."""

    def hear_of_updates(self, hear: Callable[[pb.Report], None], drop: Callable[[], None]) -> None:
        """From now on `hear` gets reports of client updates; `drop` is called when all are lost."""
        self._hear, self._drop_updates = hear, drop

    def send(self, order: pb.Order) -> None:
        """Queue an order."""
        # It may be lost to another rank only: then what this one says is of a run that is over.
        if not self.lost:
            self._line.send(order)

    def take_reports(self, timeout: float = 0.0) -> None:
        """Take every report in that has come; wait up to `timeout` s for the first."""
        try:
            while not self.lost and (report := self._line.take(timeout)) is not None:
                timeout = 0.0
                self._take(report)
        except AggregatorLost as error:
            self.give_up(str(error))

    def take_lost_clients(self) -> list[tuple[str, WireError]]:
        """Clients that the aggregator has parted with, and why, since the last call."""
        lost, self._lost_clients = self._lost_clients, []
        return lost

    # -- what it must be told ----------------------------------------------------------------------

    def admit(self, sessions: Mapping[str, str], timeout: float) -> None:
        """Let clients open their streams to the aggregator, also ones that come back; the first
        call begins the aggregator's run. Waits until they may; WireError after `timeout` seconds.
        """
        self._clients |= sessions.keys()
        clients = [pb.Admission(client=client, session=session) for client, session in sorted(sessions.items())]
        self._has_admitted = False
        self.send(pb.Order(admit=pb.Admit(window=self._first_window, clients=clients)))
        deadline = time.monotonic() + timeout
        while not self._has_admitted and not self.lost:
            if time.monotonic() > deadline:
                raise WireError(f"the aggregator admitted no clients in {timeout:.0f} s; look at its output")
            self.take_reports(timeout=0.2)
        # What is said of a client before it is admitted is about its last stay.
        self._lost_clients = [(client, error) for client, error in self._lost_clients if client not in sessions]

    def begin(self, client: str, attempt: int, with_reference: bool) -> None:
        """The client's stream to this rank is open, or windows were undone for time `attempt`: it
        begins, with the reference or a state of its own.
        """
        begin = pb.BeginClient(client=client, reference=with_reference, attempt=attempt)
        self.send(pb.Order(begin=begin))

    def part_with(self, client: str) -> None:
        """The client has left the run."""
        self._clients.discard(client)
        self.send(pb.Order(drop=pb.Drop(client=client, gone=True)))

    def commit(self, window: int, scale: float) -> None:
        """The body steps in `window`, its gradient shrunk by `scale`: the reference moves, too."""
        self.send(pb.Order(commit=pb.Commit(window=window, scale=scale)))

    def undo(self, window: int, attempt: int, attend: Callable[[], None]) -> None:
        """The windows from this one on have not happened, for time `attempt`; every rank says so.
        `attend` runs until the aggregator has forgotten them.
        """
        self.send(pb.Order(undo=pb.Undo(window=window, attempt=attempt)))
        self._await(lambda: self._undone >= attempt, attend)

    def save(self, window: int, attend: Callable[[], None]) -> bool:
        """Have the reference before `window` written; `attend` runs until it is on disk. False if
        the aggregator is lost before that.
        """
        self._saved.discard(window)
        self.send(pb.Order(save=pb.Save(window=window)))
        self._await(lambda: window in self._saved, attend)
        return window in self._saved

    def conclude(self, window: int, complete: bool, masked: Mapping[str, int]) -> None:
        """Have the final client model written. `masked` are masked tokens by client."""
        counts = {"clients": masked.keys(), "masked": masked.values()}
        self.send(pb.Order(conclude=pb.Conclude(window=window, complete=complete, **counts)))

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
        self.send(pb.Order(finish=pb.Finish(reason=reason, complete=complete)))

    def _await(self, is_so: Callable[[], bool], attend: Callable[[], None]) -> None:
        self.is_awaited = True
        while not is_so() and not self.lost:
            attend()
        self.is_awaited = False

    def _take(self, report: pb.Report) -> None:
        match report.WhichOneof("body"):
            case "admitted":
                self._has_admitted = True
            case "lost":
                kind = ConnectionLost if report.lost.may_return else WireError
                self._lost_clients.append((report.lost.client, kind(report.lost.reason)))
            case "saved":
                self._saved.add(report.saved.window)
            case "concluded":
                self.result = report.concluded.file or "client model"
            case "undone":
                self._undone = report.undone.attempt
            case _:
                self._hear(report)

    # -- when it is lost ---------------------------------------------------------------------------

    def give_up(self, reason: str) -> None:
        """The aggregator is lost, to this rank or another: await nothing more of it."""
        if self.lost:
            return
        self.lost = reason
        self._drop_updates()
        self._lost_clients = [(client, ConnectionLost(reason)) for client in sorted(self._clients)]

    def opened_again(self) -> bytes:
        """As a Line's."""
        return self._line.opened_again()

    def reopen(self, opened: bytes, window: int) -> None:
        """The aggregator is back, and goes on before `window`. All ranks call it."""
        self._line.reopen(opened, window)
        self._first_window = window
        self.lost = ""
