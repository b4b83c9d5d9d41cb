"""Runs the steps one after another, each within its time; what a step has told is never lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.card.steps import Step, allowance

Row = dict[str, Any]


@dataclass
class Outcome:
    """What a step has told, and how it ended."""

    step: str
    ended: str
    """`done`, `stopped after N s`, `no time was left`, or `failed: ` and the last line of its
    errors."""
    seconds: float
    rows: list[Row] = field(default_factory=list)


def command_of(step: Step) -> list[str]:
    """The program of a step: it prints a JSON object for each row, as soon as it has it."""
    return [sys.executable, "-m", "benchmarks.card.parts", step.name]


def run_steps(
    steps: Sequence[Step],
    seconds: float,
    on_outcome: Callable[[Outcome], None],
    command: Callable[[Step], list[str]] = command_of,
) -> None:
    """Run the steps within so many seconds; a step that fails or takes too long stops no other."""
    deadline = time.monotonic() + seconds
    for number, step in enumerate(steps):
        patience = allowance(steps[number:], deadline - time.monotonic())
        on_outcome(
            run_step(step.name, command(step), patience) if patience else Outcome(step.name, "no time was left", 0.0)
        )


def run_step(name: str, command: Sequence[str], patience: float) -> Outcome:
    """Run one program for at most `patience` seconds, with all that it starts."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(patience, stop)
    timer.start()
    errors: list[str] = []
    assert process.stdout is not None and process.stderr is not None
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()))
    reader.start()
    rows = [json.loads(line) for line in process.stdout if line.startswith("{")]
    process.wait()
    timer.cancel()
    reader.join()
    seconds = time.monotonic() - started
    told = [line.strip() for line in errors if line.strip()]
    ended = "done" if process.returncode == 0 else f"failed: {told[-1] if told else process.returncode}"
    return Outcome(name, f"stopped after {seconds:.0f} s" if stopped.is_set() else ended, round(seconds, 1), rows)
