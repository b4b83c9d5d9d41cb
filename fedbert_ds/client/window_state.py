"""Where a client stands: windows announced, pieces pending, credit given, windows applied.

Pure bookkeeping, without torch, protobuf or clock. The client, the planner's simulation and the
tests of the server share it. The states of a window at its client:

    announced    its manifest is sent
    planned      the server has cut it into pieces, one a micro-batch; a piece is pending until done
    trained      no piece is pending
    applied      the client half has taken its step; after an exchange, with the combined update

A piece may be sent when the server has given credit for it and the client half is recent enough: at
most `staleness` windows before the piece's are not applied.
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
    """Micro-batches opened and not sent, in the order of opening."""


class WindowState(Generic[Content, Piece]):
    """The windows of one client, each with a `Content`, and their pieces, each a `Piece`.

    Both are the caller's. Raises WireError for a window or piece that this client does not have.
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
        """The content of a window that is announced and not applied."""
        return self._window(window).content

    def plan(self, window: int, pieces: Mapping[int, Piece]) -> None:
        """The server has cut a window: this client's pieces by micro-batch."""
        self._window(window).pending.update(pieces)

    def miss(self, first: int, next_window: int) -> None:
        """Windows `first` to `next_window` - 1 run without this client: it was suspended, or has no
        part in them.

        Windows without an exchange are over for it. Combined updates go to every client, so a
        window with an exchange is applied when its update comes, before or after this call.
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
        """A piece has its gradient; True if no other is pending: the window is trained."""
        self.piece(window, micro_batch)
        return self._drop(window, [micro_batch])

    def skip(self, window: int, micro_batches: Iterable[int]) -> bool:
        """The server goes on without these pieces; True if the window is trained by that.

        Windows and pieces already done are ignored.
        """
        state = self._windows.get(window)
        left_out = [] if state is None else [number for number in micro_batches if number in state.pending]
        return bool(left_out) and self._drop(window, left_out)

    def apply(self, window: int) -> None:
        """The client half has taken a window's step."""
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
