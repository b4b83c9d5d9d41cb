"""A rank that is frozen: the others end in time, and the run goes on as if it had not been."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from integration.chaos import SAVE_EVERY, WINDOWS, outcome
from integration.cluster import CLIENTS, WORLD_SIZE, run_file, write_text
from integration.federation import Federation, fork_quickly

from fedbert_ds.server.heartbeat import RANK_LOST

pytestmark = pytest.mark.timeout(600)
fork_quickly()


def federation(folder: Path) -> Federation:
    folder.mkdir()
    data = write_text(folder)
    tree = run_file(
        folder,
        "run",
        run={"windows": WINDOWS, "save_every": SAVE_EVERY},
        model={"num_hidden_layers": 2, "dropout": 0.1},
        window={"order": "fixed", "tokens": 400},
        clients={"on_loss": "wait", "join_timeout": 240, "reconnect_timeout": 0.5},
    )
    return Federation(folder, tree, data)


def start(run: Federation, resume: bool = False) -> None:
    run.start_ranks(WORLD_SIZE, resume=resume)
    run.await_server()


def finish(run: Federation) -> None:
    run.wait(lambda: not run.is_running)
    assert run.failures() == {}, run.logs()


@pytest.mark.parametrize("frozen", range(WORLD_SIZE))
def test_a_frozen_rank_ends_the_run_within_a_minute_and_it_goes_on(tmp_path: Path, frozen: int) -> None:
    whole = federation(tmp_path / "whole")
    with whole:
        start(whole)
        for client in CLIENTS:
            whole.start_client(client)
        finish(whole)
    run, other = federation(tmp_path / "frozen"), f"rank {1 - frozen}"
    with run:
        start(run)
        for client in CLIENTS:
            run.start_client(client)
        run.wait(lambda: run.num_windows > SAVE_EVERY)
        number = run.processes[f"rank {frozen}"].pid
        assert number is not None
        os.kill(number, signal.SIGSTOP)
        run.wait(lambda: run.processes[other].exitcode is not None, timeout=150)
        assert run.processes[other].exitcode == RANK_LOST, run.logs()
        assert f"fedbert-ds: rank {frozen}: silent for 55 s, frozen or cut off; the run ends" in run.log(other)
        start(run, resume=True)  # which kills what is left, as a launcher does
        finish(run)
    assert outcome(run.run_folder) == outcome(whole.run_folder)
