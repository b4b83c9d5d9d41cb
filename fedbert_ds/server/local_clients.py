"""Client processes on the launcher's own machine: the program that a remote user runs."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fedbert_ds.errors import RunError
from fedbert_ds.server.body.cores import children_on
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.wire.channel import TlsFiles
from fedbert_ds.wire.identity import TOKEN_VARIABLE

RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CROSS_RANK",
    "CROSS_SIZE",
)
"""Variables that clients must not see: accelerate would take them for ranks and wait for others."""

ENDED_WELL = (0, 75)
"""Exit codes of a client whose run is complete (0), or was stopped and saved (75)."""

MOST_REVIVALS = 5
"""How often a local client is started again in a run that waits for lost clients."""


def client_name(number: int) -> str:
    """Name of a local client. Zero-padded: names sort as numbers do."""
    return f"client-{number:02d}"


def new_tokens(number: int) -> dict[str, str]:
    """A secret for each of so many local clients, by name. Whoever shows it is the launcher's."""
    return {client_name(client): secrets.token_hex(16) for client in range(number)}


@dataclass
class LocalClients:
    """The client processes. `check` finds one that failed, `wait` and `stop` end them."""

    folder: RunFolder
    devices: Sequence[str] = ("cpu",)
    """To which clients are dealt: `cpu`, or `cuda:0`, `cuda:1`, ..."""
    cores: Collection[int] = ()
    """That clients may use, where this rank is bound to fewer; none: the rank's."""
    task: str = "masked_lm"
    """What their shards are read for."""
    cache: str | None = None
    """Where they keep their tokens, as `data.cache`."""
    tls: TlsFiles | None = None
    """The server's own files: its clients show its certificate, and a token."""
    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)
    """As `new_tokens`; handed over by the environment, which other users cannot read."""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _revivals: dict[str, int] = field(default_factory=dict)
    _server: str = ""

    def start(self, server: str, names: Sequence[str]) -> None:
        """Start a client for each name. Its folder holds its shard and its output, log.txt."""
        self._server = server
        environment = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
        environment.setdefault("OMP_NUM_THREADS", "1")
        # Lines reach the log in the order of printing: a failed client's last line is its error.
        environment["PYTHONUNBUFFERED"] = "1"
        for name in names:
            shard = self.folder.shard(name)
            command = [sys.executable, "-m", "fedbert_ds.cli", "client", "--server", server, "--id", name]
            command += ["--data", str(shard), "--state", str(shard.parent), "--managed"]
            command += ["--device", self._device(name), "--task", self.task]
            command += ["--cache", self.cache] if self.cache else []
            if self.tls is not None:
                command += ["--ca", str(self.tls.ca), "--certificate", str(self.tls.certificate)]
                command += ["--key", str(self.tls.key)]
            environment[TOKEN_VARIABLE] = self.tokens.get(name, "")  # none, rather than an inherited one
            with self.folder.log(name).open("ab") as log, children_on(self.cores):
                self.processes[name] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    # Ctrl-C reaches only the launcher's process group: the server ends clients.
                    start_new_session=True,
                )

    def _device(self, name: str) -> str:
        # One that is started again keeps its place.
        number = list(self.processes).index(name) if name in self.processes else len(self.processes)
        return self.devices[number % len(self.devices)]

    def check(self) -> None:
        """Raise RunError with the last line of each failed client, if any failed."""
        if failures := self.failures():
            raise RunError("; ".join(failures))

    def revive(self) -> None:
        """Start every client again that has ended, with the run still going on.

        Raises RunError for one that has ended MOST_REVIVALS times before.
        """
        for name, process in list(self.processes.items()):
            if process.poll() is None:
                continue
            self._revivals[name] = self._revivals.get(name, 0) + 1
            if self._revivals[name] > MOST_REVIVALS:
                raise RunError(f"{name} ended {self._revivals[name]} times: {self._last_words(name)}")
            self.start(self._server, [name])

    def failures(self, patience: float = 0.0) -> list[str]:
        """The last line of each failed client. Waits up to `patience` seconds until one failed."""
        deadline = time.monotonic() + patience
        while True:
            failed = [name for name, process in self.processes.items() if process.poll() not in (None, *ENDED_WELL)]
            if failed or time.monotonic() >= deadline:
                return [self._end_of(name) for name in failed]
            time.sleep(0.1)

    def wait(self, seconds: float) -> None:
        """Wait that long for each client to end, then kill it."""
        for process in self.processes.values():
            try:
                process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def stop(self) -> None:
        """Kill every client at once."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
        for process in self.processes.values():
            process.wait()

    def _end_of(self, name: str) -> str:
        code = self.processes[name].returncode
        return f"{name} was killed by signal {-code}" if code < 0 else f"{name} ended: {self._last_words(name)}"

    def _last_words(self, name: str) -> str:
        path = self.folder.log(name)
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        last = lines[-1].removeprefix("fedbert-ds: ") if lines else "without a word"
        return f"{last} (see {path})"
