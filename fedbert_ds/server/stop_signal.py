"""Signals that make a run save and end."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Protocol


class StopFlag(Protocol):
    """A request that the run save and end."""

    requested: bool


class StopSignal:
    """Set by Ctrl-C, SIGTERM (a launcher) and SIGUSR1 (SLURM's warning).

    Another Ctrl-C then raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
