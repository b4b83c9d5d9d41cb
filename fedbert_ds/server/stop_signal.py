"""What makes a run save and end: signals, and launchers that are gone."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Protocol

from fedbert_ds.errors import warn
from fedbert_ds.server.launchers import Launchers


class StopFlag(Protocol):
    """A request that the run save and end."""

    @property
    def requested(self) -> bool:
        """Whether it was made."""
        ...


class StopSignal:
    """Set by Ctrl-C, SIGTERM (a launcher), SIGUSR1 (SLURM's warning) and SIGHUP (a terminal that
    was closed, unless nohup has it ignored), and once a launcher is gone, by kill -9 for instance:
    nobody could stop the run any more.

    Another Ctrl-C then raises KeyboardInterrupt.
    """

    def __init__(self, launchers: Launchers | None = None) -> None:
        self._is_signalled = False
        self._launchers = launchers or Launchers.of_this_process()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._ask)

    @property
    def requested(self) -> bool:
        """Whether the run shall save and end."""
        if not self._is_signalled and self._launchers.are_gone:
            self._is_signalled = True
            warn("the launcher is gone: the run saves and ends; go on with --resume")
        return self._is_signalled

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._is_signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._is_signalled = True
