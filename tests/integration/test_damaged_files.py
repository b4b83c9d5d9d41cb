"""Runs whose files are damaged, or wanted by two: real programs, with what was saved as it was."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from integration.chaos import WINDOWS, outcome
from integration.cluster import CLIENTS, WORLD_SIZE, aggregator_section, run_file, write_text
from integration.federation import Federation, fork_quickly

from fedbert_ds.server.checkpoint_folder import COMPLETE, CheckpointFolder

pytestmark = pytest.mark.timeout(600)
fork_quickly()

MODES: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "parallel": {"federation": {"mode": "parallel", "average_every": 2}},
    "elsewhere": {"aggregator": {}},
}


def federation(folder: Path, mode: str) -> Federation:
    folder.mkdir()
    data = write_text(folder)
    tree = run_file(
        folder,
        "run",
        run={"windows": WINDOWS, "save_every": 2},
        model={"num_hidden_layers": 2},
        window={"order": "fixed", "tokens": 400},
        optimizer={"schedule": "constant", "lr": 0.003, "warmup_windows": 0},
        clients={"join_timeout": 120, "reconnect_timeout": 0.5},
        **MODES[mode],
    )
    if "aggregator" in tree:
        tree["aggregator"] = aggregator_section(folder)
    return Federation(folder, tree, data)


def train(run: Federation, windows: int, resume: bool = False) -> None:
    """To the end of so many windows, by processes that end well."""
    run.tree["run"]["windows"] = windows  # type: ignore[index]
    with run:
        if "aggregator" in run.tree:
            run.start_aggregator(resume=resume)
            run.wait(lambda: "waiting for the server" in run.log("aggregator"))
        run.start_ranks(WORLD_SIZE, resume=resume)
        run.await_server()
        for client in CLIENTS:
            run.start_client(client)
        run.wait(lambda: not run.is_running)
        assert run.failures() == {}, run.logs()


def flip(path: Path) -> None:
    """One bit, in the middle: no loader would notice."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(tmp_path: Path, mode: str) -> None:
    whole, damaged = federation(tmp_path / "whole", mode), federation(tmp_path / "damaged", mode)
    train(whole, WINDOWS)
    train(damaged, 4)
    checkpoints = CheckpointFolder(damaged.run_folder / "checkpoints")
    assert checkpoints.complete_windows() == {2, 4}
    largest = max(checkpoints.of(4).iterdir(), key=lambda path: path.stat().st_size)
    flip(largest)
    train(damaged, WINDOWS, resume=True)
    told = f"warning {checkpoints.of(4)}: {largest.name} is not what was saved (SHA-256); it is left aside"
    assert told in damaged.log("rank 0"), damaged.logs()
    assert outcome(damaged.run_folder) == outcome(whole.run_folder)
    assert not checkpoints.undone.path.exists()


def test_with_no_whole_checkpoint_a_resume_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    run = federation(tmp_path / "run", "synchronous")
    train(run, 4)
    checkpoints = CheckpointFolder(run.run_folder / "checkpoints")
    for window in checkpoints.complete_windows():
        flip(checkpoints.client_model(window))
    before = {path: path.read_bytes() for path in checkpoints.path.rglob("*") if path.is_file()}
    with run:
        run.start_ranks(WORLD_SIZE, resume=True)
        run.wait(lambda: not run.is_running or bool(run.failures()))
        run.wait(lambda: run.processes["rank 0"].exitcode is not None)
        assert run.failures()["rank 0"] == 6
    line = run.log("rank 0").splitlines()[-1]
    assert line.startswith(f"fedbert-ds: {checkpoints.of(4)}: client_model.safetensors is not what was saved")
    assert {path: path.read_bytes() for path in checkpoints.path.rglob("*") if path.is_file()} == before


def test_two_runs_do_not_share_a_folder_and_nobody_else_reads_it(tmp_path: Path) -> None:
    run = federation(tmp_path / "run", "synchronous")
    umask = os.umask(0o022)
    try:
        with run:
            run.start_ranks(WORLD_SIZE)
            run.await_server()
            intruder = Federation(tmp_path / "intruder", run.tree, run.data)
            intruder.folder.mkdir()
            address = (run.run_folder / "server.address").read_text()
            with intruder:
                intruder.start(
                    "rank 0",
                    ["--config", str(intruder.run_file()), "--resume"],
                    {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
                )  # fmt: skip
                intruder.wait(lambda: not intruder.is_running)
                assert intruder.failures() == {"rank 0": 6}
            last = intruder.log("rank 0").splitlines()[-1]
            assert last.startswith(f"fedbert-ds: {run.run_folder}: in use by process {run.processes['rank 0'].pid} on ")
            assert last.endswith("; end that first, or set another run.directory")
            assert (run.run_folder / "server.address").read_text() == address
            for client in CLIENTS:
                run.start_client(client)
            run.wait(lambda: not run.is_running)
            assert run.failures() == {}, run.logs()
    finally:
        os.umask(umask)
    checkpoints = CheckpointFolder(run.run_folder / "checkpoints")
    assert (checkpoints.of(WINDOWS) / COMPLETE).is_file()
    for path in (run.run_folder, *run.run_folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
