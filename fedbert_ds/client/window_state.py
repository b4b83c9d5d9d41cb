"""Where a client stands: windows announced, pieces pending, credit given, windows applied.

Pure bookkeeping, without torch, protobuf or clock; the client, the planner's simulation and the tests of
the server share it. A window goes through these states at its client:

    announced    its manifest is sent
    planned      the server has cut it into pieces, one a micro-batch; each is pending until it is done
    trained      no piece is pending
    applied      the client half has taken its step; after an exchange, with the combined update

A piece may be sent once the server has given credit for it and the client half is recent enough: every
window before the piece's, less `staleness` windows, is applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fedbert_ds.errors import WireError
from fedbert_ds.federation.strategy import Strategy

Content = TypeVar("Content")
Piece = TypeVar("Piece")


@dataclass
class _Window(Generic[Content, Piece]):
    content: Content
    pending: dict[int, Piece] = field(default_factory=dict)
    """Pieces that are not done, by micro-batch."""
    credit: list[int] = field(default_factory=list)
    """Micro-batches the server has asked for and that are not sent, in the order of asking."""


class WindowState(Generic[Content, Piece]):
    """The windows of one client; `Content` and `Piece` are what the caller keeps with each window and piece.

    Raises WireError where the server asks for a window or piece that this client does not have.
    """

    def __init__(self, strategy: Strategy, staleness: int, first_window: int = 0) -> None:
        self._strategy, self._staleness = strategy, staleness
        self._windows: dict[int, _Window[Content, Piece]] = {}
        self._applied = first_window
        self._applied_ahead: set[int] = set()

    @property
    def applied(self) -> int:
        """Every window before this one is applied."""
        return self._applied

    def announce(self, window: int, content: Content) -> None:
        """The manifest of a window is sent."""
        self._windows[window] = _Window(content)

    def content(self, window: int) -> Content:
        """What was announced of a window that is not applied."""
        return self._window(window).content

    def first_content(self, window: int) -> Content | None:
        """What was announced of the first window from `window` on; None if nothing was."""
        later = [number for number in self._windows if number >= window]
        return self._windows[min(later)].content if later else None

    def plan(self, window: int, pieces: Mapping[int, Piece]) -> None:
        """The server has cut a window: this client's pieces by micro-batch."""
        self._window(window).pending.update(pieces)

    def miss(self, first: int, next_window: int) -> None:
        """The windows from `first` up to `next_window` run without this client, which was suspended.

        A window without an exchange is over for it. Combined updates go to every client, so a window
        with one is applied when its update is here, which may be before this call.
        """
        for window in range(first, next_window):
            if self._strategy.exchange_after(window) == "nothing":
                self.apply(window)

    def open(self, window: int, micro_batch: int) -> None:
        """The server gives credit for a piece."""
        self.piece(window, micro_batch)
        self._windows[window].credit.append(micro_batch)

    def take_sendable(self) -> list[tuple[int, int]]:
        """(window, micro-batch) of the pieces that may be sent now, each once."""
        sendable = []
        for number, window in self._windows.items():
            if number <= self._applied + self._staleness:
                sendable += [(number, micro_batch) for micro_batch in window.credit]
                window.credit.clear()
        return sendable

    def piece(self, window: int, micro_batch: int) -> Piece:
        """A pending piece."""
        pending = self._window(window).pending
        if micro_batch not in pending:
            raise WireError(f"the server asks for micro-batch {micro_batch}, in which this client has no piece")
        return pending[micro_batch]

    def finish(self, window: int, micro_batch: int) -> bool:
        """A piece has its gradient; True if that was the last one, so that the window is trained."""
        self.piece(window, micro_batch)
        return self._drop(window, [micro_batch])

    def skip(self, window: int, micro_batches: Iterable[int]) -> bool:
        """The server goes on without these pieces; True if the window is trained by that.

        Windows and pieces that are done already are ignored.
        """
        state = self._windows.get(window)
        left_out = [] if state is None else [number for number in micro_batches if number in state.pending]
        return bool(left_out) and self._drop(window, left_out)

    def apply(self, window: int) -> None:
        """The client half has taken a window's step, with the combined update if there is an exchange."""
        self._windows.pop(window, None)
        if window >= self._applied:
            self._applied_ahead.add(window)
        while self._applied in self._applied_ahead:
            self._applied_ahead.remove(self._applied)
            self._applied += 1

    def _window(self, number: int) -> _Window[Content, Piece]:
        window = self._windows.get(number)
        if window is None:
            raise WireError(f"the server sent a message of window {number}, which this client has not under way")
        return window

    def _drop(self, number: int, micro_batches: Iterable[int]) -> bool:
        window = self._windows[number]
        for micro_batch in micro_batches:
            window.pending.pop(micro_batch, None)
            window.credit = [opened for opened in window.credit if opened != micro_batch]
        return not window.pending
