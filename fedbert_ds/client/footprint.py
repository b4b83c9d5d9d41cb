"""A client's process and memory: what it does not load, what it gives back, the most it had."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

UNUSED = ("scipy", "PIL")
"""Packages that a client does not need, 30 MB. transformers imports them where they are installed,
for losses and images."""

LARGE_BYTES = 128 << 10
"""Blocks from this size on go back to the system as soon as they are freed."""

_M_MMAP_THRESHOLD = -3
"""glibc's number of the option, of malloc.h."""


def leave_out_unused() -> None:
    """Keep this process from importing what it does not need, if it has not yet.

    Call it before the rest of the client is imported. Without a GPU nothing launches a kernel, and
    torch would import Triton, 75 MB.
    """
    import torch

    for name in (*UNUSED, *(() if torch.cuda.is_available() else ("triton",))):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def return_large_blocks() -> None:
    """Have malloc return large blocks when they are freed, where it is glibc's.

    By default it learns from the first that is freed to keep blocks up to 32 MB, and so keeps a
    process as large as its largest moment.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)


def return_free_memory() -> None:
    """Return what malloc keeps for later, where it is glibc's: after a phase that ends for good."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def peak_memory_bytes() -> int:
    """Most memory this process has held at once (resident set)."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux counts into ru_maxrss what the process that started this one had.
        lines = status.read_text(encoding="utf-8").splitlines()
        if told := [line.split()[1] for line in lines if line.startswith("VmHWM:")]:
            return int(told[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset"))  # noqa: B009 (typed for this system only)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
