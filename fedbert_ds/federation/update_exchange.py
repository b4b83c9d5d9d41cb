"""Client halves on their way: collected from a rank's clients, decoded and combined in a thread beside the body."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor

Half = tuple[Mapping[str, Tensor], float]
"""Tensors of a half (weights or gradients) and the weight they have in an average."""
Combine = Callable[[list[Half], bool], dict[str, Tensor]]
"""(this rank's halves, whether to average) -> the sum or average over all ranks; all ranks call it."""


@dataclass
class _Round:
    """One window's exchange on this rank."""

    average: bool
    awaited: set[str]
    is_due: bool = False
    """The body has stepped: clients have all they need for their halves."""
    halves: dict[str, Future[Half]] = field(default_factory=dict)
    """Decoded, or being so."""


class UpdateExchange:
    """Windows whose halves are exchanged, one after another in the same order on every rank.

    A window's round ends when every client it waits for has delivered or is gone. Rounds are combined in a thread,
    since other ranks may come later and the body has something better to do than to wait for them.
    """

    def __init__(self, combine: Combine) -> None:
        self._combine = combine
        self._rounds: dict[int, _Round] = {}
        self._combining: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="half-exchange")
        self._last_progress = time.monotonic()

    def expect(self, window: int, clients: Iterable[str], average: bool) -> None:
        """From now on halves of this window are taken from these clients; windows come in order."""
        self._rounds[window] = _Round(average, set(clients))

    def due(self, window: int) -> None:
        """From now on silence about this window's halves counts."""
        if window in self._rounds:
            self._rounds[window].is_due = True
            self._last_progress = time.monotonic()

    def deliver(self, window: int, client: str, decode: Callable[[], Half]) -> None:
        """A client's half has arrived whole, and is decoded in the thread.

        One that came too late, of a client that was passed over, is dropped.
        """
        round_ = self._rounds.get(window)
        if round_ is not None and client in round_.awaited:
            round_.awaited.remove(client)
            round_.halves[client] = self._thread.submit(decode)

    def progress(self) -> None:
        """A part of some half has come: only silence counts against a client, not a slow link."""
        self._last_progress = time.monotonic()

    def forget(self, client: str) -> list[int]:
        """A client is gone. What it delivered before that counts; the windows whose half of it is left out."""
        left_out = [window for window, round_ in self._rounds.items() if client in round_.awaited]
        for window in left_out:
            self._rounds[window].awaited.remove(client)
        return left_out

    def take_unsound(self) -> list[tuple[str, BaseException]]:
        """Clients whose half could not be decoded, and why; nothing of it is combined."""
        unsound = []
        for round_ in self._rounds.values():
            for client, half in list(round_.halves.items()):
                if half.done() and (error := half.exception()) is not None:
                    del round_.halves[client]
                    unsound.append((client, error))
        return unsound

    def poll(self) -> tuple[int, dict[str, Tensor]] | None:
        """(window, combined half) of a round that has ended, once; starts the next. Raises what `combine` raised."""
        combined = None
        if self._combining is not None and self._combining[1].done():
            window, future = self._combining
            self._combining = None
            combined = window, future.result()
        if self._combining is None and self._rounds:
            window, round_ = next(iter(self._rounds.items()))
            if not round_.awaited and all(half.done() and not half.exception() for half in round_.halves.values()):
                del self._rounds[window]
                # By name, so that the sum does not depend on who came first.
                halves = [half.result() for _, half in sorted(round_.halves.items())]
                self._combining = window, self._thread.submit(self._combine, halves, round_.average)
        return combined

    def is_done(self, before: int) -> bool:
        """Nothing is awaited or being combined of windows below `before`."""
        pending = [*self._rounds, *([self._combining[0]] if self._combining is not None else [])]
        return all(window >= before for window in pending)

    @property
    def is_idle(self) -> bool:
        """Nothing is awaited and nothing is being combined."""
        return not self._rounds and self._combining is None

    @property
    def is_combining(self) -> bool:
        """A result is about to come, of which nobody is told but by `poll`."""
        first = next(iter(self._rounds.values()), None)
        return self._combining is not None or (first is not None and not first.awaited)

    @property
    def quiet_seconds(self) -> float:
        """Seconds since the last part of any half came."""
        return time.monotonic() - self._last_progress

    @property
    def late(self) -> frozenset[str]:
        """Clients whose half is awaited and due."""
        return frozenset(client for round_ in self._rounds.values() if round_.is_due for client in round_.awaited)

    def close(self) -> None:
        """Take no more; the thread ends by itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)
