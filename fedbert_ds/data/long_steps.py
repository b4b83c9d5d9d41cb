"""How far a long step over text is: a live line on a terminal, a line a minute in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
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
    out = stream or sys.stdout
    is_live = out.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    pause = LIVE_SECONDS if is_live else LOG_SECONDS
    begun = told = clock()
    done, width = 0, 0
    try:
        for item in items:
            yield item
            done += size(item)
            if clock() - told >= pause:
                told = clock()
                line = _line(what, done, total, told - begun)
                if is_live:
                    width = max(width, len(line))
                    out.write(f"\r{line.ljust(width)}")
                    out.flush()
                else:
                    print(line, file=out, flush=True)
    finally:
        if width:
            out.write(f"\r{' ' * width}\r")
            out.flush()


def _line(what: str, done: int, total: int | None, seconds: float) -> str:
    line = f"{what}: {done / 1e6:,.0f} million characters"
    if not total:
        return line
    left = seconds * max(0, total - done) / max(1, done)
    return f"{line} of {total / 1e6:,.0f} million, {min(100, 100 * done // total)} %, {_minutes(left)} left"


def _minutes(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min" if minutes else "less than a minute"
