"""Client updates on one rank: collected, decoded and combined in a thread beside the body."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor

from fedbert_ds.federation.client_update import ClientUpdate, Tensors

Bounded = list[tuple[str, float]]
"""Clients whose update was too large, and how many times what may count it was."""
Combine = Callable[[Mapping[str, ClientUpdate], bool], dict[str, Tensor]]
"""(updates by client, whether to average) -> average or sum over all ranks, collectively."""


@dataclass
class _WindowUpdates:
    """The updates of one window on this rank."""

    average: bool
    masked: Mapping[str, int]
    """Masked tokens behind each client's update, as this server has counted them."""
    awaited: set[str]
    """Clients that have not delivered."""
    decoded: dict[str, Future[Tensors]] = field(default_factory=dict)
    """Delivered updates by client; decoding may still run."""


class UpdateExchange:
    """Combines the updates of each window, window after window in the same order on every rank.

    A window is combined once each of its clients has delivered or is gone. A thread combines,
    because other ranks may be late; the body waits only where it is clipped with the updates.
    """

    def __init__(self, combine: Combine, take_bounded: Callable[[], Bounded] = list) -> None:
        self._combine = combine
        self.take_bounded = take_bounded
        """What was bounded since the last call."""
        self._windows: dict[int, _WindowUpdates] = {}
        self._combining: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="update-exchange")

    def expect(self, window: int, masked: Mapping[str, int], average: bool) -> None:
        """Accept updates of this window from these clients; windows come in order.

        `masked` are the masked tokens behind each one's update, its weight in an average.
        """
        self._windows[window] = _WindowUpdates(average, dict(masked), set(masked))

    def awaited(self, window: int) -> frozenset[str]:
        """Clients that have not delivered their update of this window."""
        return frozenset(self._windows[window].awaited) if window in self._windows else frozenset()

    def deliver(self, window: int, client: str, decode: Callable[[], Tensors]) -> None:
        """Take a client's complete update, to be decoded in the thread.

        An update that is not awaited, because it came after its client was suspended, is dropped.
        """
        updates = self._windows.get(window)
        if updates is not None and client in updates.awaited:
            updates.awaited.remove(client)
            updates.decoded[client] = self._thread.submit(decode)

    def forget(self, client: str) -> list[int]:
        """Await nothing more from a client; returns the windows combined without it.

        Updates it delivered before still count.
        """
        left_out = [window for window, updates in self._windows.items() if client in updates.awaited]
        for window in left_out:
            self._windows[window].awaited.remove(client)
        return left_out

    def take_unsound(self) -> list[tuple[str, BaseException]]:
        """Remove updates that could not be decoded; returns their clients and errors."""
        unsound = []
        for updates in self._windows.values():
            for client, update in list(updates.decoded.items()):
                if update.done() and (error := update.exception()) is not None:
                    del updates.decoded[client]
                    unsound.append((client, error))
        return unsound

    def poll(self) -> tuple[int, dict[str, Tensor]] | None:
        """(window, combined tensors) once the next window is combined, or None; the call after it
        starts the next one, so `combine` finds what the caller did with the last result.

        Raises what `combine` raised.
        """
        if self._combining is not None and self._combining[1].done():
            window, future = self._combining
            self._combining = None
            return window, future.result()
        if self._combining is None and self._windows:
            window, updates = next(iter(self._windows.items()))
            if not updates.awaited and all(
                update.done() and not update.exception() for update in updates.decoded.values()
            ):
                del self._windows[window]
                # By name, so that the sum does not depend on who came first.
                in_order = {
                    client: ClientUpdate(update.result(), float(updates.masked[client]))
                    for client, update in sorted(updates.decoded.items())
                }
                self._combining = window, self._thread.submit(self._combine, in_order, updates.average)
        return None

    def is_done(self, before: int) -> bool:
        """Every window below `before` is combined."""
        pending = [*self._windows, *([self._combining[0]] if self._combining is not None else [])]
        return all(window >= before for window in pending)

    @property
    def is_idle(self) -> bool:
        """No update is awaited and no window is being combined."""
        return not self._windows and self._combining is None

    @property
    def is_combining(self) -> bool:
        """A window is being combined or about to be; only `poll` tells when it is done."""
        first = next(iter(self._windows.values()), None)
        return self._combining is not None or (first is not None and not first.awaited)

    def close(self) -> None:
        """Accept no more updates; the thread ends by itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)
