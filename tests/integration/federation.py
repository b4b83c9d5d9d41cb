"""The real programs of one run, each a process that tests start, kill and start again at will."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml
from integration.chaos_process import Kill, run_process
from integration.processes import PROCESSES
from integration.processes import fork_quickly as fork_quickly


@dataclass
class Federation:
    """Ranks and clients of one run file, in `folder`. Leaving the block kills them all.

    `data` is each client's text. Every process writes its output to a log of its name.
    """

    folder: Path
    tree: Mapping[str, Any]
    data: Mapping[str, str]
    processes: dict[str, BaseProcess] = field(default_factory=dict)

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill(*self.processes)

    @property
    def run_folder(self) -> Path:
        """`run.directory`."""
        return Path(self.tree["run"]["directory"])

    @property
    def num_windows(self) -> int:
        """Windows that are trained and reported."""
        path = self.run_folder / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.is_file() else 0

    def metrics(self) -> list[dict[str, Any]]:
        """One row for each window."""
        return [json.loads(line) for line in (self.run_folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def is_running(self) -> bool:
        """Some process has not ended."""
        return any(process.is_alive() for process in self.processes.values())

    def state(self, client: str) -> Path:
        """A client's state folder."""
        return self.folder / f"state of {client}"

    def failures(self) -> dict[str, int]:
        """Exit codes of the processes that have ended otherwise than well."""
        codes = {name: process.exitcode for name, process in self.processes.items()}
        return {name: code for name, code in codes.items() if code}

    def start_ranks(self, num: int, *overrides: str, resume: bool = False, kills: Sequence[Kill] = ()) -> None:
        """Start so many ranks; those there were are killed first, their address is forgotten."""
        (self.run_folder / "server.address").unlink(missing_ok=True)
        self.restart_ranks(num, *overrides, resume=resume, kills=kills)

    def restart_ranks(self, num: int, *overrides: str, resume: bool = False, kills: Sequence[Kill] = ()) -> None:
        """Start so many ranks in the folder as it is; those there were are killed first."""
        self.kill(*(name for name in self.processes if name.startswith("rank")))
        config = self.run_file()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(num):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            arguments = ["--config", str(config), *overrides, *(["--resume"] if resume else [])]
            self.start(f"rank {rank}", arguments, {key: str(value) for key, value in variables.items()}, kills)

    def await_server(self) -> None:
        """Wait until clients can join. One that finds no server waits longer every time."""
        address = self.run_folder / "server.address"
        self.wait(lambda: address.is_file() or bool(self.failures()))

    def start_aggregator(self, resume: bool = False, kills: Sequence[Kill] = ()) -> None:
        """Start the aggregator of another party."""
        arguments = ["aggregator", "--config", str(self.run_file()), *(["--resume"] if resume else [])]
        self.start("aggregator", arguments, {}, kills)

    def start_client(self, name: str, process: str = "", kills: Sequence[Kill] = ()) -> None:
        """Start a client, under another process name if its own is taken."""
        arguments = ["client", "--server", str(self.run_folder / "server.address"), "--id", name, "--device", "cpu"]
        arguments += ["--data", self.data[name], "--state", str(self.state(name)), "--rejoin-timeout", "120"]
        self.start(process or name, arguments, {}, kills)

    def inspect(self, name: str) -> None:
        """Have somebody ask what the run would have a client send."""
        self.start(name, ["client", "--server", str(self.run_folder / "server.address"), "--id", name, "--inspect"], {})

    def kill(self, *names: str) -> None:
        """Kill -9 these processes and forget them."""
        for name in names:
            self.processes[name].kill()
        for name in names:
            self.processes.pop(name).join(30)

    def stop_ranks(self) -> None:
        """Ask the ranks to save and end."""
        for name, process in self.processes.items():
            if name.startswith("rank"):
                process.terminate()  # nothing, where it has just ended by itself

    def wait(
        self, is_so: Callable[[], bool], timeout: float = 120.0, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        """Wait until it is so; AssertionError, with all logs, if it is not within `timeout` s."""
        deadline = time.monotonic() + timeout
        while not is_so():
            time.sleep(0.02)
            meanwhile()
            assert time.monotonic() < deadline, f"not so within {timeout:.0f} s\n{self.logs()}"

    def logs(self) -> str:
        """The ends of all logs."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {log.stem}\n{log.read_text(errors='replace')[-2500:]}" for log in logs)

    def log(self, process: str) -> str:
        """A process' output."""
        path = self.folder / f"{process}.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def run_file(self) -> Path:
        """The run file, written anew."""
        path = self.folder / "run.yaml"
        # At once: a process that was started before may be reading it.
        whole = self.folder / "run.yaml.whole"
        whole.write_text(yaml.safe_dump(dict(self.tree)))
        whole.replace(path)
        return path

    def start(self, name: str, arguments: list[str], variables: dict[str, str], kills: Sequence[Kill] = ()) -> None:
        """Start a program of this name, with these arguments and environment variables."""
        process = PROCESSES.Process(
            target=run_process, args=(name, arguments, variables, self.folder / f"{name}.log", list(kills))
        )
        process.start()
        self.processes[name] = process
