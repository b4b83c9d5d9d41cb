"""The programs that started this rank: without them nobody watches the run, or starts it again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import psutil

from fedbert_ds.server.network.neighbour import has_ended

SECONDS_BETWEEN_LOOKS = 1.0


class Launchers:
    """Says when one of them is gone, whichever way it ended."""

    def __init__(self, processes: Sequence[psutil.Process], clock: Callable[[], float] = time.monotonic) -> None:
        self._processes = processes
        self._clock = clock
        self._next_look = clock()
        self._are_gone = False

    @classmethod
    def of_this_process(cls) -> Launchers:
        """Its parent, and what the parent's process group has above that: torchrun's agent,
        deepspeed's two programs, a batch script. Not a shell with groups of its own, which may end
        before what it started.
        """
        parents = psutil.Process().parents()
        if not parents or parents[0].pid == 1:
            return cls([])  # a container's first program: when it ends, so does all
        group = _group(parents[0])
        above = [process for process in parents[1:] if process.pid != 1 and _group(process) == group]
        return cls([parents[0], *above])

    @property
    def are_gone(self) -> bool:
        """Whether one has ended. Looks once a second at most."""
        if not self._are_gone and self._clock() >= self._next_look:
            self._next_look = self._clock() + SECONDS_BETWEEN_LOOKS
            self._are_gone = any(map(has_ended, self._processes))
        return self._are_gone


def _group(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except OSError:
        return None
