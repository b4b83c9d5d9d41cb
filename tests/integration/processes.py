"""Processes forked off one that has imported everything: each is up at once."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PROCESSES = multiprocessing.get_context("forkserver")


def fork_quickly() -> None:
    """Have `preload` imported by the process that all others are forked off. Call it before the
    first of them starts.
    """
    # That process finds modules by its environment alone.
    tests = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([tests, *filter(None, sys.path)]))
    PROCESSES.set_forkserver_preload(["integration.preload"])


def start(
    target: Callable[..., None], arguments: Sequence[Any], variables: Mapping[str, Any], log: Path
) -> BaseProcess:
    """Start a process that calls `target` with these variables in its environment."""
    fork_quickly()
    environment = {key: str(value) for key, value in variables.items()}
    process = PROCESSES.Process(target=_run, args=(target, arguments, environment, log))
    process.start()
    return process


def _run(target: Callable[..., None], arguments: Sequence[Any], environment: dict[str, str], log: Path) -> None:
    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(environment)
    target(*arguments)
