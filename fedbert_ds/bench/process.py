"""Processes that a benchmark starts: one thread for arithmetic each, and none outlives it."""

from __future__ import annotations

import os
import subprocess
from typing import Any


def environment(device: str) -> dict[str, str]:
    """Of a process whose body or clients run on this device; GPUs are hidden from what runs on the CPU."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
    return os.environ | {"OMP_NUM_THREADS": "1"} | hidden


def end(process: subprocess.Popen[Any], patience: float) -> None:
    """End a process that still runs: in order, and after so many seconds by force."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
