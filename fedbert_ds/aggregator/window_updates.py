"""Client updates at the aggregator by window: early, expected, combined, held, committed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from fedbert_ds.aggregator.expectations import Expectations
from fedbert_ds.errors import WireError
from fedbert_ds.federation.averaging import global_norm
from fedbert_ds.federation.client_update import Tensors
from fedbert_ds.federation.update_exchange import Combine, UpdateExchange

Decode = Callable[[], Tensors]


class Committed(NamedTuple):
    """A combined update of which the ranks have made use."""

    window: int
    tensors: Mapping[str, Tensor]
    """fp32 by name, scaled as the ranks' clipping says."""


class WindowUpdates:
    """Holds each client's update until its window is combined, and that until the ranks commit it.

    A client may be `most_early` windows ahead of the ranks. `combine` works in a thread of its own.
    Methods raise WireError for an order or an update that does not fit.
    """

    def __init__(self, combine: Combine, ranks: int, most_early: int, clips: bool) -> None:
        self._exchange = UpdateExchange(combine)
        self._expectations = Expectations(ranks)
        self._most_early = most_early
        self._clips = clips
        self._early: dict[tuple[int, str], Decode] = {}
        """Updates that came before every rank had announced their window."""
        self._held: tuple[int, dict[str, Tensor]] | None = None
        """A combined update, until the ranks commit its window."""
        self._scales: dict[int, float] = {}
        """Committed windows whose update is not applied yet."""

    @property
    def is_combining(self) -> bool:
        """An update is being combined, which no event ends."""
        return self._exchange.is_combining

    @property
    def is_idle(self) -> bool:
        """Nothing is awaited, combined or held."""
        return self._exchange.is_idle and self._held is None

    def expect(self, rank: int, window: int, average: bool, clients: Mapping[str, int]) -> None:
        """A rank's part of a window, with the masked tokens behind each client's update; the last
        rank's part begins it.
        """
        expectation = self._expectations.add(rank, window, average, clients)
        if expectation is None:
            return
        self._exchange.expect(expectation.window, expectation.clients, expectation.average)
        for place in [place for place in self._early if place[0] <= expectation.window]:
            self._exchange.deliver(*place, self._early.pop(place))

    def deliver(self, client: str, window: int, decode: Decode) -> None:
        """A client's update is here."""
        if window <= self._expectations.complete:
            self._exchange.deliver(window, client, decode)
            return
        early = [place for place in self._early if place[1] == client]
        if (window, client) in early or len(early) > self._most_early:
            raise WireError(f"client {client}: an update of window {window}, which is not under way")
        self._early[window, client] = decode

    def forget(self, client: str) -> None:
        """Await nothing more from a client. What it delivered counts, as it does among ranks."""
        delivered = {window for window, name in self._early if name == client}
        self._expectations.drop(client, delivered)
        self._exchange.forget(client)

    def commit(self, window: int, scale: float) -> None:
        """The ranks have stepped, with gradients shrunk by `scale`."""
        if not 0.0 < scale <= 1.0 or window in self._scales:
            raise WireError(f"window {window} committed twice or badly scaled")
        self._scales[window] = scale

    def undo(self, window: int) -> None:
        """The windows from this one on have not happened."""
        if not self._exchange.is_idle:
            raise WireError(f"window {window} is to be undone while it is being combined")
        self._expectations.undo(window)
        self._early = {place: decode for place, decode in self._early.items() if place[0] < window}
        self._scales = {number: scale for number, scale in self._scales.items() if number < window}
        if self._held is not None and self._held[0] >= window:
            self._held = None

    def take_unsound(self) -> list[tuple[str, BaseException]]:
        """Remove updates that could not be decoded; returns their clients and errors."""
        return self._exchange.take_unsound()

    def take_combined(self) -> tuple[int, float] | None:
        """The next window that is combined, once, and its norm, or 0 where nothing is clipped.

        One at a time: the next may build on what this one moves the reference to.
        """
        if self._held is not None or (combined := self._exchange.poll()) is None:
            return None
        self._held = combined
        window, tensors = combined
        return window, global_norm(tensors) if self._clips else 0.0

    def take_committed(self) -> Committed | None:
        """The held update, once its window is committed."""
        if self._held is None or self._held[0] not in self._scales:
            return None
        window, tensors = self._held
        self._held, scale = None, self._scales.pop(window)
        scaled = {name: tensor * scale for name, tensor in tensors.items()} if scale < 1.0 else tensors
        return Committed(window, scaled)

    def close(self) -> None:
        """Accept no more updates; the thread ends by itself."""
        self._exchange.close()
