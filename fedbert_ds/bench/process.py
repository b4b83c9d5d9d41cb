"""Processes that a benchmark starts: one thread for arithmetic each, and none outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedbert_ds.errors import RunError

LONGEST_SECONDS = 1800.0
"""Of one run."""


def exit_on_sigterm() -> None:
    """From now on SIGTERM unwinds this process as Ctrl-C does and so ends its child processes."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def environment(device: str) -> dict[str, str]:
    """Environment of a process on this device; a process on the CPU sees no GPU."""
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


@contextmanager
def running(
    command: Sequence[str], log: Path, device: str, more: dict[str, str] | None = None, answers: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A process with one thread for arithmetic that ends with this block.

    Its errors go to the log, and what it prints too, unless that `answers` the benchmark.
    """
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if answers else errors,
            stderr=errors,
            text=True,
            env=environment(device) | (more or {}),
        )
        try:
            yield process
        finally:
            if process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.close()
            end(process, patience=30)
            if process.stdout is not None:
                process.stdout.close()


def tell(process: subprocess.Popen[str], line: str) -> None:
    """Write a line to a process of `running`; nothing happens if it has ended."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(f"{line}\n")
        process.stdin.flush()


def address_of(server: str) -> str:
    """The address given to a program, or for "-" the first line of its standard input."""
    return sys.stdin.readline().strip() if server == "-" else server


def last_line(process: subprocess.Popen[str], log: Path, told: str = "") -> str:
    """Tell a process this; the last line that it prints. RunError names the log if none."""
    try:
        printed, _ = process.communicate(told, timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        raise RunError(f"a run took more than {LONGEST_SECONDS / 60:.0f} minutes (see {log})") from None
    if process.returncode or not printed.strip():
        raise RunError(f"a run failed (see {log})")
    return printed.strip().splitlines()[-1]
