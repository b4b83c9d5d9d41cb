"""How far a run is: one live line on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from fedbert_ds.telemetry.metrics import Summary, WindowMetrics, summary

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

RECENT_WINDOWS = 20
"""Windows that rates and the shown loss are averaged over."""
QUIET_SECONDS = 30.0
"""Longest silence in a log file, while windows are being finished."""
BAR_WIDTH = 12


class Progress:
    """Shows each finished window on `stream`; use as a context manager.

    `peak_flops` is what the body's FLOP/s are compared with.
    """

    def __init__(
        self,
        total_windows: int,
        clients_expected: int,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
        peak_flops: float | None = None,
    ) -> None:
        self._total_windows = total_windows
        self._clients_expected = clients_expected
        self._peak_flops = peak_flops
        self._stream = stream
        self._clock = clock
        self._held_out = ""
        self._recent: deque[WindowMetrics] = deque(maxlen=RECENT_WINDOWS)
        self._printed_window = -1
        self._printed_at = clock()
        self._live = _live_line(total_windows, stream) if _is_terminal(stream) else None
        before = len(f"window {total_windows}/{total_windows} ") + BAR_WIDTH + 1
        self._room = self._live.console.width - before if self._live else None

    def update(self, metrics: WindowMetrics) -> None:
        """Take in a finished window."""
        self._recent.append(metrics)
        done = metrics.window + 1
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=done, status=self._status(done, self._room))
        elif self._is_due(done):
            self._print(f"window {done}/{self._total_windows}  {self._status(done)}")
            self._printed_window, self._printed_at = done, self._clock()

    def evaluated(self, window: int, held_out: str) -> None:
        """Show the held-out losses of the state before `window` from now on."""
        self._held_out = held_out
        if self._live is None:
            self._print(f"window {window}/{self._total_windows}  {held_out}")

    def note(self, text: str) -> None:
        """Print a line of its own, above the live one."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._print(text)

    def close(self) -> None:
        """Leave the last state on the screen; a second call does nothing."""
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _is_due(self, done: int) -> bool:
        step = max(1, self._total_windows // 20)
        passed = done // step > self._printed_window // step
        return passed or done == self._total_windows or self._clock() - self._printed_at >= QUIET_SECONDS

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def _status(self, done: int, width: int | None = None) -> str:
        recent = summary(self._recent)
        left = (self._total_windows - done) * recent.seconds / recent.windows
        pieces = {
            "loss": f"loss {recent.loss:.2f}",
            "held out": self._held_out,
            "rate": f"{short_number(recent.tokens_per_second)} tokens/s",
            "busy": f"body busy {100 * recent.busy_share:.0f} %{self._share_of_peak(recent)}",
            "clients": f"{self._recent[-1].clients}/{self._clients_expected} clients",
            "wire": f"{short_bytes(recent.bytes_per_token)}/token",
            "left": f"{duration(left)} left",
        }
        if not any(window.forwards for window in self._recent):  # there is no body
            del pieces["busy"]
        if not self._held_out:
            del pieces["held out"]
        # On a narrow terminal what changes least goes first, so that the line stays one line.
        for name in ("wire", "clients", "busy", "rate", "held out"):
            if width is None or len("  ".join(pieces.values())) <= width:
                break
            if name == "clients" and self._recent[-1].clients < self._clients_expected:
                continue
            pieces.pop(name, None)
        return "  ".join(pieces.values())

    def _share_of_peak(self, recent: Summary) -> str:
        return f", {100 * recent.flops_per_second / self._peak_flops:.0f} % of peak" if self._peak_flops else ""


def short_number(value: float) -> str:
    """Three significant digits with k, M, G or T: 18.2k, 780k, 1.50M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            scaled = value / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{value:.0f}"


def short_bytes(value: float) -> str:
    """Bytes in the unit that reads well: 512 B, 1.1 kB, 3.4 MB."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size * 0.9995:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours and days where there are any: 1:12, 3:05:00, 2 d 4 h."""
    whole = round(seconds)
    days, hours = divmod(whole // 3600, 24)
    minutes, rest = whole // 60 % 60, whole % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _live_line(total_windows: int, stream: TextIO) -> RichProgress:
    # rich belongs to the server extra, and costs time to import: only where a live line is drawn.
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    live = RichProgress(
        TextColumn("window {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=BAR_WIDTH),
        TextColumn("{task.fields[status]}", markup=False),
        console=Console(file=stream),
        refresh_per_second=4,
    )
    live.add_task("", total=total_windows, status="waiting for the first window")
    live.start()
    return live
