"""The commands of docs/clusters.md on two nodes, with clients at a third over mutual TLS: losses
and weights are those of two ranks and their clients on one machine, bit by bit."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from integration.chaos import Outcome, outcome
from integration.cluster import run_file, write_text
from integration.federation import Federation, fork_quickly
from integration.page_commands import ROOT, Page
from integration.virtual_nodes import VirtualNodes, why_not

pytestmark = [pytest.mark.timeout(900), pytest.mark.skipif(bool(why_not()), reason=str(why_not()))]
fork_quickly()

NODES = ("gpu01", "gpu02")
OWNERS = {"hospital-a": 9, "hospital-b": 5}
WINDOWS = 6
PAGE = Page(
    "docs/clusters.md",
    {"configs/bert-base.yaml": "toy.yaml", "slots=8": "slots=1", "--nproc-per-node 8": "--nproc-per-node 1"},
)
VARIABLES = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
SSH = """#!/usr/bin/env bash
# Stands in for ssh, and as pdsh for pdsh: runs a command in virtual nodes, with a new environment.
set -uo pipefail
enter() {{
  case $1 in
{nodes}
    *) exit 255 ;;
  esac
}}
if [[ ${{0##*/}} == ssh ]]; then
  [[ $1 != -o ]] || shift 2
  host=$1 && shift
  enter "$host" "$*"
  exit
fi
while [[ $1 == -* ]]; do
  [[ $1 != -w ]] || IFS=, read -ra hosts <<<"$2"
  if [[ $1 == -S ]]; then shift; else shift 2; fi
done
for number in "${{!hosts[@]}}"; do
  line="$*"
  enter "${{hosts[number]}}" "${{line//%n/$number}}" &
done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit "$status"
"""


def tree_of(folder: Path) -> dict:
    """The toy run in `folder`, its ranks in their order."""
    return run_file(
        folder,
        "run",
        run={"windows": WINDOWS},
        model={"num_hidden_layers": 2, "dropout": 0.1},
        window={"order": "fixed", "tokens": 300},
        clients={"expected": len(OWNERS), "join_timeout": 240, "silence_timeout": 240},
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_text(tmp_path_factory.mktemp("text"), OWNERS)


@pytest.fixture(scope="module")
def expected(text: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The same run with everything on this machine, in plain text."""
    folder = tmp_path_factory.mktemp("one machine")
    (folder / "tokenizer").symlink_to(Path(text["hospital-a"]).parent / "tokenizer")
    with Federation(folder, tree_of(folder), text) as run:
        run.start_ranks(len(NODES))
        run.await_server()
        for owner in OWNERS:
            run.start_client(owner)
        run.wait(lambda: not run.is_running, timeout=300)
        assert run.failures() == {}, run.logs()
    return outcome(folder / "run", WINDOWS)


@pytest.fixture
def repository(text: Mapping[str, str], tmp_path: Path) -> Path:
    """A folder as a user has it before a run: the repository, certificates and the page's files."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "launchers").symlink_to(ROOT / "launchers")
    (folder / "tokenizer").symlink_to(Path(text["hospital-a"]).parent / "tokenizer")
    (folder / "toy.yaml").write_text(yaml.safe_dump(tree_of(folder)))
    (folder / "cluster.yaml").write_text(PAGE.block("Before the first run", 1))
    (folder / "hosts").write_text(PAGE.block("DeepSpeed"))
    (folder / ".deepspeed_env").write_text("\n".join(f"{name}={value}" for name, value in VARIABLES.items()))
    environment = os.environ | with_programs()
    subprocess.run(["bash", "-ec", PAGE.block("Before the first run")], cwd=folder, env=environment, check=True)
    for owner in OWNERS:
        own = tmp_path / owner
        own.mkdir()
        (own / "notes.jsonl").symlink_to(text[owner])
        for name in ("ca.pem", f"{owner}.pem", f"{owner}.key"):
            (own / name).write_bytes((folder / "certs" / name).read_bytes())
    return folder


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[VirtualNodes]:
    with VirtualNodes(tmp_path, [*NODES, "hospital"]) as started:
        yield started


def with_programs(*folders: Path) -> dict[str, str]:
    """A path on which the programs of this Python come first, behind these folders."""
    here = [*map(str, folders), str(Path(sys.executable).parent)]
    return VARIABLES | {"PATH": os.pathsep.join([*here, os.environ["PATH"]])}


def start_clients(nodes: VirtualNodes, launchers: list[subprocess.Popen], repository: Path) -> list[subprocess.Popen]:
    """Start the clients once ranks listen."""
    address = repository / "runs" / "cluster" / "server.address"
    _wait(lambda: address.is_file() or any(process.poll() for process in launchers), nodes)
    command = PAGE.block("The clients")
    return [
        nodes.start("hospital", command.replace("hospital-a", owner), owner, repository.parent / owner, with_programs())
        for owner in OWNERS
    ]


def finish(nodes: VirtualNodes, processes: list[subprocess.Popen], repository: Path) -> Outcome:
    """Wait until all end well."""
    _wait(lambda: all(one.poll() is not None for one in processes) or any(one.poll() for one in processes), nodes)
    assert [one.returncode for one in processes] == [0] * len(processes), nodes.logs()
    return outcome(repository / "runs" / "cluster", WINDOWS)


def _wait(is_so, nodes: VirtualNodes) -> None:
    deadline = time.monotonic() + 400
    while not is_so():
        time.sleep(0.1)
        assert time.monotonic() < deadline, nodes.logs()


def test_deepspeed_with_a_hostfile(expected: Outcome, nodes: VirtualNodes, repository: Path) -> None:
    programs = repository.parent / "bin"
    programs.mkdir()
    clean = 'env -i HOME="$HOME" PATH=/usr/local/bin:/usr/bin:/bin'
    cases = "\n".join(f'    {node}) {clean} {shlex.join(nodes.command(node, "")[:-1])} "$2" ;;' for node in NODES)
    for name in ("ssh", "pdsh"):
        (programs / name).write_text(SSH.format(nodes=cases))
        (programs / name).chmod(0o755)
    with (nodes.folder / "deepspeed.log").open("wb") as log:
        launcher = subprocess.Popen(
            ["bash", "-c", PAGE.block("DeepSpeed", 1)], cwd=repository, stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, env=os.environ | with_programs(programs)
        )  # fmt: skip
    clients = start_clients(nodes, [launcher], repository)
    assert finish(nodes, [launcher, *clients], repository) == expected


def test_torchrun_on_each_node(expected: Outcome, nodes: VirtualNodes, repository: Path) -> None:
    launchers = [nodes.start(node, PAGE.block("torchrun"), node, repository, with_programs()) for node in NODES]
    clients = start_clients(nodes, launchers, repository)
    assert finish(nodes, [*launchers, *clients], repository) == expected
