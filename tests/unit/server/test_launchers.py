"""Whoever watched the run is missed within seconds, and nobody else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedbert_ds.server.launchers import SECONDS_BETWEEN_LOOKS, Launchers

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX's")

TREE = """
import os, subprocess, sys
numbers, groups, log = sys.argv[1], sys.argv[2], sys.argv[3]
with open(numbers, "a") as file:
    file.write(f"{os.getpid()}\\n")
if groups:
    subprocess.run([sys.executable, "-c", sys.argv[4], numbers, groups[1:], log, sys.argv[4]],
                   start_new_session=groups[0] == "x")
else:
    import time
    from fedbert_ds.server.launchers import Launchers
    launchers = Launchers.of_this_process()
    with open(log, "w") as file:
        print("watches", file=file, flush=True)
        while not launchers.are_gone:
            time.sleep(0.05)
        print("gone", file=file, flush=True)
"""


class Tree:
    """Programs that started each other, the last of which watches. In `groups` a letter says of
    each but the first whether it has a process group of its own (x) or its parent's (-).
    """

    def __init__(self, folder: Path, groups: str) -> None:
        self.log, numbers = folder / "log", folder / "numbers"
        command = [sys.executable, "-c", TREE, str(numbers), groups, str(self.log), TREE]
        self.first = subprocess.Popen(command, start_new_session=True)
        wait_for(lambda: self.log.is_file() and "watches" in self.log.read_text())
        self.numbers = [int(line) for line in numbers.read_text().split()]

    def says_gone(self, seconds: float = 20.0) -> bool:
        return wait_for(lambda: "gone" in self.log.read_text(), seconds)

    def end(self) -> None:
        for number in self.numbers:
            if psutil.pid_exists(number):
                os.kill(number, signal.SIGKILL)
        self.first.wait()


def wait_for(is_so: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_so()


@pytest.fixture
def trees(tmp_path: Path) -> Iterator[list[Tree]]:
    started: list[Tree] = []
    yield started
    for tree in started:
        tree.end()


@pytest.mark.parametrize(
    ("groups", "killed"),
    [("-", 0), ("x", 0), ("--", 0), ("--", 1), ("-x", 0), ("-x", 1)],
    ids=["parent", "torchrun's agent", "deepspeed", "its launch.py", "a script of torchrun", "its agent"],
)
def test_a_launcher_that_is_killed_is_missed(tmp_path: Path, trees: list[Tree], groups: str, killed: int) -> None:
    tree = Tree(tmp_path, groups)
    trees.append(tree)
    os.kill(tree.numbers[killed], signal.SIGKILL)
    assert tree.says_gone()


def test_a_shell_that_ends_before_what_it_started_is_not(tmp_path: Path, trees: list[Tree]) -> None:
    """`nohup deepspeed ... &` in a shell that gives each command a group."""
    tree = Tree(tmp_path, "x-")
    trees.append(tree)
    os.kill(tree.numbers[0], signal.SIGKILL)
    assert not tree.says_gone(3 * SECONDS_BETWEEN_LOOKS)
    os.kill(tree.numbers[1], signal.SIGKILL)
    assert tree.says_gone()


def test_a_container_s_first_program_has_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    class First:
        pid = 1

        def is_running(self) -> bool:
            raise AssertionError("it was looked at")

    monkeypatch.setattr(psutil.Process, "parents", lambda self: [First()])
    assert not Launchers.of_this_process().are_gone


def test_it_looks_once_a_second() -> None:
    looks, now = 0, 100.0

    class Process:
        def is_running(self) -> bool:
            nonlocal looks
            looks += 1
            return True

        def status(self) -> str:
            return psutil.STATUS_SLEEPING

    process: Any = Process()
    launchers = Launchers([process], lambda: now)
    assert not any(launchers.are_gone for _ in range(100)) and looks == 1
    now += SECONDS_BETWEEN_LOOKS
    assert not launchers.are_gone and looks == 2
