"""How far a long step over text is: a live line on a terminal, a line a minute in a log."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

LIVE_SECONDS = 0.5
LOG_SECONDS = 60.0
"""Between two lines. What takes less is not told at all."""

Item = TypeVar("Item")


def telling(
    items: Iterable[Item],
    what: str,
    size: Callable[[Item], int],
    total: int | None = None,
    *,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Item]:
    """The items, and now and then a line that says how far they are: `what`, characters so far, and
    of a known `total` the share and the time that is left.
    """
    place = _Place(stream or sys.stdout)
    begun = told = clock()
    done = 0
    try:
        for item in items:
            yield item
            done += size(item)
            if clock() - told >= place.pause:
                told = clock()
                place.show(_line(what, done, total, told - begun))
    finally:
        place.clear()


@contextmanager
def working(
    what: str,
    *,
    stream: TextIO | None = None,
    pause: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[None]:
    """Tell of a block whose end cannot be foreseen, now and then: `what`, and the time so far.

    For code that holds no Python lock, such as a tokenizer's training.
    """
    place = _Place(stream or sys.stdout)
    over, begun = threading.Event(), clock()

    def tell() -> None:
        while not over.wait(pause or place.pause):
            place.show(f"{what}: {_seconds(clock() - begun)} so far")

    thread = threading.Thread(target=tell, name="long step", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        place.clear()


class _Place:
    """Where a step is told of: a terminal's last line, or line by line."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._is_live = out.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._width = 0
        self.pause = LIVE_SECONDS if self._is_live else LOG_SECONDS

    def show(self, line: str) -> None:
        if not self._is_live:
            print(line, file=self._out, flush=True)
            return
        self._width = max(self._width, len(line))
        self._out.write(f"\r{line.ljust(self._width)}")
        self._out.flush()

    def clear(self) -> None:
        if self._width:
            self._out.write(f"\r{' ' * self._width}\r")
            self._out.flush()


def _line(what: str, done: int, total: int | None, seconds: float) -> str:
    line = f"{what}: {done / 1e6:,.0f} million characters"
    if not total:
        return line
    left = seconds * max(0, total - done) / max(1, done)
    return f"{line} of {total / 1e6:,.0f} million, {min(100, 100 * done // total)} %, {_minutes(left)} left"


def _minutes(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min" if minutes else "less than a minute"


def _seconds(seconds: float) -> str:
    return _minutes(seconds) if seconds >= 60 else f"{seconds:.0f} s"
