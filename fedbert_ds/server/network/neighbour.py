"""Processes on this machine: whether one has ended for good, kill -9 included."""

from __future__ import annotations

import psutil

from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.shared_memory import accept


def neighbour(shared: pb.Shared) -> psutil.Process | None:
    """The client's process, if it proves with its memory that it is on this machine."""
    memory = accept(shared)
    if memory is None:
        return None
    memory.close()
    try:
        return psutil.Process(shared.process)
    except psutil.Error:
        return None


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended."""
    try:
        # A number that another process has now counts as ended, and so does one nobody waited for.
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True
