"""SLURM's commands of docs/clusters.md on two virtual nodes, each with a real slurmd.

    python tests/integration/slurm_cluster.py             what `make test-slurm` runs: ten minutes
    python tests/integration/slurm_cluster.py --keep DIR  leave the run and all logs there

The server's job is warned as before its time limit, requeued as at a preemption, and loses a rank
to kill -9, each in the middle of a window. Losses and weights must be those of the same run with
ranks and clients on this machine, undisturbed, bit by bit. Needs root and SLURM with munge
(Debian: slurm-wlm, munge); one line says what is missing. Daemons, their configuration and state
are in a folder of their own, and end with the nodes.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import yaml

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from integration.chaos import Outcome, outcome
from integration.cluster import run_file, write_text
from integration.federation import Federation, fork_quickly
from integration.page_commands import ROOT, Page
from integration.virtual_nodes import VirtualNodes, why_not

NODES = ("gpu01", "gpu02")
CLIENTS = {"client-0": 9, "client-1": 5}
WINDOWS = 120
SAVE_EVERY = 7
PATIENCE = 600.0
"""Seconds for one step of the whole. SLURM lets a requeued job wait for two minutes: with less,
what it still sends to the job's last step would meet the next one, which has the same number."""
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue")
PAGE = Page(
    "docs/clusters.md",
    {
        "configs/bert-base.yaml": "toy.yaml",
        "--gpus-per-node=8 --cpus-per-task=64": "--export=ALL,RANKS_PER_NODE=1",
    },
)
SLURM_CONF = """\
ClusterName=test
SlurmctldHost=gpu01
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
NodeName=gpu[01-02] CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """What this machine lacks for the test, in one line; None if nothing."""
    absent = [name for name in DAEMONS if shutil.which(name) is None]
    return f"SLURM is not installed: no {', '.join(absent)}" if absent else why_not()


class Cluster:
    """SLURM on the nodes of `nodes`. Daemons end with the nodes."""

    def __init__(self, nodes: VirtualNodes) -> None:
        self._nodes = nodes
        folder = nodes.folder
        self._variables = {"SLURM_CONF": str(folder / "slurm.conf"), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        self._variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def start(self) -> None:
        """Start the daemons; returns when both nodes wait for jobs."""
        folder = self._nodes.folder
        folder.chmod(0o711)  # munge's socket is everybody's
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder))
        (folder / "munge.key").write_bytes(secrets.token_bytes(64))
        (folder / "munge.key").chmod(0o600)
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = " ".join(f"--{option} {folder}/munge.{ending}" for option, ending in files.items())
        self._start("gpu01", f"munged --foreground --force {munge}", "munged")
        wait_until((folder / "munge.socket").exists, self._nodes)
        self._start("gpu01", "slurmctld -D", "slurmctld")
        for node in NODES:
            self._start(node, f"slurmd -D -N {node}", f"slurmd {node}")
        wait_until(lambda: self.run("sinfo --noheader --states idle --format %D") == "2", self._nodes)

    def run(self, script: str, folder: Path | None = None) -> str:
        """Run lines of bash on the first node; what they print. "" where they fail."""
        command = self._nodes.command("gpu01", f"cd {folder or self._nodes.folder}\n{script}")
        done = subprocess.run(
            command, env=os.environ | self._variables, capture_output=True, text=True, timeout=120, check=False
        )
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """A job's state and how often it was queued again: RUNNING 1."""
        words = dict(word.split("=", 1) for word in self.run(f"scontrol -o show job {job}").split() if "=" in word)
        return f"{words.get('JobState', 'none')} {words.get('Restarts', 0)}"

    def processes(self, node: str) -> list[psutil.Process]:
        """The node's processes."""
        return self._nodes.processes(node)

    def _start(self, node: str, script: str, log: str) -> None:
        self._nodes.start(node, f"exec {script}", log, self._nodes.folder, self._variables)


def wait_until(is_so: Callable[[], bool], nodes: VirtualNodes) -> None:
    """Wait until it is so; RuntimeError, with all logs, after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        time.sleep(0.1)
        if time.monotonic() > deadline:
            raise RuntimeError(f"not so within {PATIENCE:.0f} s\n{nodes.logs()}")


def tree_of(folder: Path) -> dict:
    """The toy run in `folder`, its ranks in their order."""
    return run_file(
        folder,
        "run",
        run={"windows": WINDOWS, "save_every": SAVE_EVERY},
        model={"num_hidden_layers": 2, "dropout": 0.1},
        window={"order": "fixed", "tokens": 300},
        clients={"expected": len(CLIENTS), "on_loss": "wait", "join_timeout": 600, "silence_timeout": 240},
    )


def undisturbed(folder: Path, data: Mapping[str, str]) -> Outcome:
    """The run with ranks and clients on this machine."""
    folder.mkdir()
    (folder / "tokenizer").symlink_to(folder.parent / "shards" / "tokenizer")
    with Federation(folder, tree_of(folder), data) as run:
        run.start_ranks(len(NODES))
        run.await_server()
        for client in CLIENTS:
            run.start_client(client)
        run.wait(lambda: not run.is_running, timeout=PATIENCE)
        if run.failures():
            raise RuntimeError(run.logs())
    return outcome(folder / "run", WINDOWS)


def repository(folder: Path, data: Mapping[str, str]) -> Path:
    """A folder as a user has it before a run: the repository, its environment, shards, run file."""
    here = folder / "repository"
    (here / "shards").mkdir(parents=True)
    (here / ".venv").symlink_to(sys.prefix)
    (here / "launchers").symlink_to(ROOT / "launchers")
    (here / "tokenizer").symlink_to(folder / "shards" / "tokenizer")
    for client, path in data.items():
        (here / "shards" / f"shard-{client.partition('-')[2]}.jsonl").symlink_to(path)
    (here / "toy.yaml").write_text(yaml.safe_dump(tree_of(here)))
    (here / "cluster.yaml").write_text(PAGE.block("Before the first run", 1))
    return here


def disturbed(nodes: VirtualNodes, here: Path) -> Outcome:
    """The run under SLURM, disturbed three times."""
    cluster = Cluster(nodes)
    cluster.start()
    cluster.run(PAGE.block("Before the first run"), here)
    job = cluster.run(f"{PAGE.block('SLURM')}echo $job", here).split()[-1]
    run = here / "runs" / f"slurm-{job}"
    metrics = run / "metrics.jsonl"

    def num_windows() -> int:
        return len(metrics.read_text().splitlines()) if metrics.is_file() else 0

    def lose_a_rank() -> None:
        for process in cluster.processes(NODES[1]):
            if process.name().startswith("python") and "launchers/pretrain.py" in process.cmdline():
                process.kill()

    disturbances: dict[str, Callable[[], object]] = {
        "is warned, as before its time limit": lambda: cluster.run(f"scancel --signal=USR1 --batch {job}"),
        "is requeued, as at a preemption": lambda: cluster.run(f"scontrol requeue {job}"),
        "loses a rank to kill -9": lose_a_rank,
    }
    for number, (what, disturb) in enumerate(disturbances.items()):
        seen = num_windows()
        wait_until(lambda seen=seen: num_windows() > seen + SAVE_EVERY, nodes)
        print(f"window {num_windows()}: the job {what}", flush=True)
        disturb()
        again = f"RUNNING {number + 1}"
        wait_until(lambda again=again: cluster.state(job) == again, nodes)
    wait_until(lambda: not cluster.run("squeue --noheader"), nodes)
    if not cluster.state(job).startswith("COMPLETED"):
        raise RuntimeError(f"job {job} is {cluster.state(job)}\n{nodes.logs()}")
    return outcome(run, WINDOWS)


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True)
        yield kept.resolve()
        return
    # Names of sockets are short.
    folder = Path(tempfile.mkdtemp(prefix="fedbert-slurm-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def build_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder for the run and all logs")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if both runs end alike, and where SLURM is not installed."""
    options = build_parser().parse_args(arguments)
    if (lacks := missing()) is not None:
        print(f"test-slurm: skipped: {lacks}")
        return 0
    fork_quickly()
    with _folder(options.keep) as folder:
        (folder / "shards").mkdir()
        data = write_text(folder / "shards", CLIENTS)
        expected = undisturbed(folder / "undisturbed", data)
        here = repository(folder, data)
        with VirtualNodes(folder, NODES) as nodes:
            found = disturbed(nodes, here)
    is_same = found == expected
    print(f"{WINDOWS} windows: losses and weights {'are' if is_same else 'ARE NOT'} those of the undisturbed run")
    return 0 if is_same else 1


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except RuntimeError as error:
        raise SystemExit(f"test-slurm: {error}") from error
