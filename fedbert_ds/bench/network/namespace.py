"""A network namespace behind a link that the kernel delays and limits (tc netem): root on Linux.

    with Namespace(delay_ms=25, mbit=800) as there:
        subprocess.Popen([*there.enter, "program", ...])      # reaches this machine as `there.host`

All that runs in it shares the one link, so `mbit` is for all of them together.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Literal

LIMIT = 1_000_000
"""Packets that the link may hold: more than its rate times its delay, so that none is dropped."""


def run_tool(*command: str) -> None:
    """Run `ip` or `tc`; CalledProcessError when it fails."""
    subprocess.run(command, check=True, capture_output=True, timeout=30)


def links_available() -> Literal["netem", "proxy"]:
    """`netem` if this process may make namespaces and the kernel has netem, else `proxy`."""
    if not (hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("ip") and shutil.which("tc")):
        return "proxy"
    name = f"fedbert-probe-{os.getpid()}"
    try:
        run_tool("ip", "netns", "add", name)
        try:
            run_tool("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
        finally:
            run_tool("ip", "netns", "delete", name)
    except (OSError, subprocess.SubprocessError):
        return "proxy"
    return "netem"


@dataclass(frozen=True)
class There:
    """The namespace, from this side."""

    host: str
    """This machine's address at its end of the link."""
    enter: tuple[str, ...]
    """Put before a command, this runs it in the namespace."""


class Namespace:
    """Exists with its links inside the block. CalledProcessError when `ip` or `tc` fails."""

    def __init__(self, delay_ms: float, mbit: float | None) -> None:
        self._name = f"fedbert-{os.getpid()}"
        self._here, self._there = f"fb{os.getpid() % 10**6}a", f"fb{os.getpid() % 10**6}b"
        self._link = ["netem", "delay", f"{delay_ms:g}ms", "limit", str(LIMIT)]
        self._link += ["rate", f"{mbit:g}mbit"] if mbit else []

    def __enter__(self) -> There:
        subnet = f"10.233.{os.getpid() % 256}"
        inside = ("ip", "netns", "exec", self._name)
        run_tool("ip", "netns", "add", self._name)
        try:
            run_tool("ip", "link", "add", self._here, "type", "veth", "peer", "name", self._there, "netns", self._name)
            run_tool("ip", "addr", "add", f"{subnet}.1/30", "dev", self._here)
            run_tool("ip", "link", "set", self._here, "up")
            run_tool(*inside, "ip", "addr", "add", f"{subnet}.2/30", "dev", self._there)
            run_tool(*inside, "ip", "link", "set", self._there, "up")
            run_tool(*inside, "ip", "link", "set", "lo", "up")
            run_tool("tc", "qdisc", "add", "dev", self._here, "root", *self._link)
            run_tool(*inside, "tc", "qdisc", "add", "dev", self._there, "root", *self._link)
        except BaseException:
            self.__exit__()
            raise
        return There(f"{subnet}.1", inside)

    def __exit__(self, *error: object) -> None:
        run_tool("ip", "netns", "delete", self._name)
