"""Machines on one switch, each a set of namespaces: a name, an address and processes of its own.

    with VirtualNodes(folder, ["gpu01", "gpu02"]) as nodes:
        subprocess.run(nodes.command("gpu02", "ping -c 1 gpu01"))

They share this machine's files, as nodes of a cluster do. Nothing is set on this machine itself,
and all of it is gone with the last of its processes. Needs root on Linux, `ip` and util-linux.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

SWITCH = "switch"
"""The node that the others are linked by."""
TOOLS = ("ip", "mount", "nsenter", "unshare")
NEW = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc")
# `cat` ends when this side closes its input or dies. bash is the node's first process: it reaps
# what others leave, and with it all of the node's processes end.
FIRST_PROCESS = 'hostname "$0" && mount --bind "$1" /etc/hosts && ip link set lo up && echo ready && cat; exit'


def why_not() -> str | None:
    """Why this machine can have no virtual nodes, in one line; None where it can."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"no {', '.join(missing)} here"
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    probed = "hostname probe && mount --bind /etc/hosts /etc/hosts && ip link set lo up"
    probed += " && ip link add probe type bridge && ip link add here type veth peer name there"
    probe = subprocess.run([*NEW, "sh", "-ec", probed], capture_output=True, text=True, timeout=60)
    return f"no network namespaces here: {probe.stderr.strip()}" if probe.returncode else None


class VirtualNodes:
    """Nodes of these names. Leaving the block ends every process in them.

    `folder` gets a log of each program. A node's names are in its /etc/hosts.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.names = tuple(names)
        self._first: dict[str, int] = {}
        self._at_end = ExitStack()

    def __enter__(self) -> VirtualNodes:
        try:
            for name in (SWITCH, *self.names):
                self._first[name] = self._begin(name)
            self._link()
        except BaseException:
            self._at_end.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._at_end.close()

    def command(self, node: str, script: str) -> list[str]:
        """What runs a line of bash in the node."""
        enter = ["nsenter", "--target", str(self._first[node]), "--net", "--uts", "--mount", "--pid"]
        return [*enter, "bash", "-c", script]

    def start(
        self, node: str, script: str, log: str, folder: Path, variables: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a line of bash in the node, in `folder`; its output goes to this log."""
        command = self.command(node, f"cd {shlex.quote(str(folder))} && {script}")
        with (self.folder / f"{log}.log").open("ab") as output:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | variables
            )

    def processes(self, node: str) -> list[psutil.Process]:
        """All processes in the node."""
        here = os.readlink(f"/proc/{self._first[node]}/ns/pid")
        return [process for process in psutil.process_iter() if _namespace(process) == here]

    def logs(self) -> str:
        """The ends of all logs."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {log.stem}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    def _begin(self, name: str) -> int:
        hosts = self.folder / "hosts of all nodes"
        lines = ["127.0.0.1 localhost", *(f"{self._address(name)} {name}" for name in self.names)]
        hosts.write_text("\n".join(lines) + "\n")
        holder = subprocess.Popen(
            [*NEW, "bash", "-c", FIRST_PROCESS, name, str(hosts)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._at_end.callback(_end, holder)
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the virtual node {name} did not begin")
        return psutil.Process(holder.pid).children()[0].pid

    def _link(self) -> None:
        run = ["nsenter", "--target", str(self._first[SWITCH]), "--net", "sh", "-c"]
        script = ["ip link add bridge type bridge", "ip link set bridge up"]
        for name in self.names:
            script += [
                f"ip link add {name} type veth peer name eth0 netns {self._first[name]}",
                f"ip link set {name} master bridge up",
            ]
        subprocess.run([*run, " && ".join(script)], check=True, timeout=60)
        for name in self.names:
            own = f"ip addr add {self._address(name)}/24 dev eth0 && ip link set eth0 up"
            subprocess.run(self.command(name, own), check=True, timeout=60)

    def _address(self, name: str) -> str:
        return f"10.0.0.{self.names.index(name) + 1}"


def _end(holder: subprocess.Popen[bytes]) -> None:
    assert holder.stdin is not None and holder.stdout is not None
    holder.stdin.close()
    holder.wait(60)
    holder.stdout.close()


def _namespace(process: psutil.Process) -> str | None:
    try:
        return os.readlink(f"/proc/{process.pid}/ns/pid")
    except OSError:
        return None  # it has ended
