"""Client processes of the launcher: what they are told, what a failed one said, and that none
outlives the run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedbert_ds.errors import RunError
from fedbert_ds.server import local_clients
from fedbert_ds.server.local_clients import RANK_VARIABLES, LocalClients, client_name, new_tokens
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.wire.tls import TlsFiles

PYTHON = sys.executable


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LocalClients]]:
    """Starts clients that run a line of Python each instead of the client program."""
    running: list[LocalClients] = []
    monkeypatch.setattr(local_clients.sys, "executable", PYTHON)  # and back at the end

    def start(**programs: str) -> LocalClients:
        clients = LocalClients(RunFolder(tmp_path))
        running.append(clients)
        for name, program in programs.items():
            (tmp_path / "clients" / name).mkdir(parents=True)
            script = tmp_path / f"{name}.sh"
            script.write_text(f"#!/bin/sh\nexec {PYTHON} -c '{program}' \"$@\"\n")
            script.chmod(0o755)
            monkeypatch.setattr(local_clients.sys, "executable", str(script))
            clients.start("127.0.0.1:1", [name])
        return clients

    yield start
    for clients in running:
        clients.stop()


def start_more(clients: LocalClients, program: str) -> None:
    """Start ada, who runs this line of Python."""
    folder = clients.folder.path
    (folder / "clients" / "ada").mkdir(parents=True)
    script = folder / "ada.sh"
    script.write_text(f"#!/bin/sh\nexec {PYTHON} -c '{program}' \"$@\"\n")
    script.chmod(0o755)
    local_clients.sys.executable = str(script)
    clients.start("127.0.0.1:1", ["ada"])


def wait_for_failures(clients: LocalClients) -> list[str]:
    return clients.failures(patience=30.0)


def test_names_sort_as_numbers() -> None:
    names = [client_name(number) for number in range(100)]
    assert names == sorted(names) and names[3] == "client-03"


def test_clients_are_dealt_to_devices_and_keep_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    class Ended:
        def __init__(self, command: list[str], **_: object) -> None:
            commands.append(command)

        def poll(self) -> int:
            return 1

    monkeypatch.setattr(local_clients.subprocess, "Popen", Ended)
    names = [client_name(number) for number in range(3)]
    for name in names:
        (tmp_path / "clients" / name).mkdir(parents=True)
    clients = LocalClients(RunFolder(tmp_path), ["cuda:0", "cuda:1"], task="token_classification", cache="large")
    clients.start("127.0.0.1:1", names)
    assert all(command[command.index("--task") + 1] == "token_classification" for command in commands)
    assert all(command[command.index("--cache") + 1] == "large" for command in commands)
    clients.revive()
    asked = [command[command.index("--device") + 1] for command in commands]
    assert asked == ["cuda:0", "cuda:1", "cuda:0"] * 2
    clients.processes.clear()


def test_by_default_clients_leave_the_gpus_to_the_ranks(started: Callable[..., LocalClients], tmp_path: Path) -> None:
    started(ada='import sys; sys.exit(sys.argv[sys.argv.index("--device") + 1])')
    log = RunFolder(tmp_path).log("ada")
    deadline = time.monotonic() + 30.0
    while log.read_text() != "cpu\n":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_failed_client_is_named_with_its_last_line(started: Callable[..., LocalClients], tmp_path: Path) -> None:
    clients = started(
        ada="import time; time.sleep(60)",
        bo='import sys; print("first"); print("fedbert-ds: no text in x; check --data", file=sys.stderr); sys.exit(3)',
    )
    log = RunFolder(tmp_path).log("bo")
    assert wait_for_failures(clients) == [f"bo ended: no text in x; check --data (see {log})"]
    with pytest.raises(RunError, match=r"^bo ended: no text in x; check --data"):
        clients.check()


def test_a_client_that_ends_well_or_says_nothing(started: Callable[..., LocalClients]) -> None:
    clients = started(ada="pass", bo="import sys; sys.exit(75)", cy="import os; os._exit(9)")
    for process in clients.processes.values():
        process.wait(timeout=30)
    assert [failure.split(" (see")[0] for failure in clients.failures()] == ["cy ended: without a word"]


def test_a_client_that_is_killed_is_named_as_such(started: Callable[..., LocalClients]) -> None:
    clients = started(ada="import time; time.sleep(60)")
    clients.processes["ada"].kill()
    assert wait_for_failures(clients) == ["ada was killed by signal 9"]


def test_a_client_is_no_rank(started: Callable[..., LocalClients], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in RANK_VARIABLES:
        monkeypatch.setenv(variable, "3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    program = (
        'import os, sys; print(" ".join(sorted(os.environ)), os.environ["OMP_NUM_THREADS"], sys.argv[1:]); sys.exit(1)'
    )
    clients = started(ada=program)
    (failure,) = wait_for_failures(clients)
    assert not set(failure.split()) & set(RANK_VARIABLES)
    folder = clients.folder.clients / "ada"
    expected = ["-m", "fedbert_ds.cli", "client", "--server", "127.0.0.1:1", "--id", "ada"]
    expected += ["--data", str(folder / "shard.jsonl"), "--state", str(folder), "--managed", "--device", "cpu"]
    expected += ["--task", "masked_lm"]
    assert f" 1 {expected} (see" in failure


def test_a_token_is_handed_over_where_no_other_user_reads_it(
    started: Callable[..., LocalClients], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the environment, never on the command line; the same when it is started again."""
    monkeypatch.setenv("FEDBERT_CLIENT_TOKEN", "of somebody else")
    tokens = new_tokens(2)
    assert list(tokens) == [client_name(0), client_name(1)] and len(set(tokens.values())) == 2
    program = 'import os, sys; print(os.environ["FEDBERT_CLIENT_TOKEN"], sys.argv); sys.exit(1)'
    clients = started()
    clients.tokens = {"ada": tokens["client-00"]}
    for again in (False, True):
        if again:
            clients.revive()
        else:
            start_more(clients, program)
        clients.processes["ada"].wait(timeout=30)
    lines = clients.folder.log("ada").read_text().splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]
    token, words = lines[0].split(" ", 1)
    assert token == tokens["client-00"] and token not in words and token not in repr(clients)


def test_local_clients_show_their_server_s_certificate(started: Callable[..., LocalClients], tmp_path: Path) -> None:
    clients = started()
    clients.tls = TlsFiles(tmp_path / "ca.pem", tmp_path / "body.pem", tmp_path / "body.key")
    start_more(clients, "import sys; print(sys.argv); sys.exit(1)")
    (failure,) = wait_for_failures(clients)
    for option, name in (("--ca", "ca.pem"), ("--certificate", "body.pem"), ("--key", "body.key")):
        assert str([option, str(tmp_path / name)])[1:-1] in failure


def test_whoever_has_ended_is_started_again(started: Callable[..., LocalClients], tmp_path: Path) -> None:
    """With the same words, and its output goes on in the same log."""
    clients = started(ada="import time; time.sleep(60)", bo='import sys; print("again"); sys.exit(9)')
    ada, bo = clients.processes["ada"], clients.processes["bo"]
    bo.wait(timeout=30)
    clients.revive()
    assert clients.processes["ada"] is ada and clients.processes["bo"] is not bo
    arguments = clients.processes["bo"].args
    assert isinstance(arguments, list) and arguments[1:] == bo.args[1:], "the same server and folder"


def test_a_client_that_ends_again_and_again_ends_the_run(
    started: Callable[..., LocalClients], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_clients, "MOST_REVIVALS", 2)
    clients = started(bo='import sys; print("fedbert-ds: no text in x", file=sys.stderr); sys.exit(3)')
    for _ in range(2):
        clients.processes["bo"].wait(timeout=30)
        clients.revive()
    clients.processes["bo"].wait(timeout=30)
    with pytest.raises(RunError, match=r"^bo ended 3 times: no text in x"):
        clients.revive()


def test_none_outlives_the_run(started: Callable[..., LocalClients]) -> None:
    clients = started(ada="import time; time.sleep(60)", bo="import time; time.sleep(60)")
    clients.check()
    begun = time.monotonic()
    clients.wait(seconds=0.2)
    assert time.monotonic() - begun < 20
    assert all(process.poll() is not None for process in clients.processes.values())
    clients.stop()
