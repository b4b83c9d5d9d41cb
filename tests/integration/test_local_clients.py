"""Local clients that are killed, and what becomes of their run: real programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from integration.cluster import run_file, write_text
from integration.federation import Federation, fork_quickly

pytestmark = pytest.mark.timeout(900)
fork_quickly()


def federation(place: Path, **clients: Any) -> Federation:
    """One rank and two local clients; a lost connection would be waited for, for an hour."""
    names = {"client-00": 6, "client-01": 5}
    data = write_text(place, names)
    source = place / "all.jsonl"
    source.write_text("".join(Path(path).read_text() for path in data.values()))
    tree = run_file(
        place,
        "run",
        run={"windows": 60, "save_every": 1000},
        model={"num_hidden_layers": 2},
        window={"tokens": 300},
        data={"source": [str(source)], "held_out": 0.1},
        clients={"local": 2, "expected": 2, "reconnect_timeout": 3600, "silence_timeout": 3600} | clients,
    )
    return Federation(place, tree, data)


def kill_client(run: Federation, name: str) -> None:
    """Kill -9 a local client, by its own rank's list of processes."""
    rank = psutil.Process(run.processes["rank 0"].pid)
    (process,) = [child for child in rank.children(recursive=True) if name in child.cmdline()]
    process.kill()


def test_a_run_that_needs_a_local_client_which_was_killed_saves_and_names_it(tmp_path: Path) -> None:
    with federation(tmp_path) as run:
        run.start_ranks(1)
        run.wait(lambda: run.num_windows >= 2, timeout=400)
        kill_client(run, "client-01")
        run.wait(lambda: not run.is_running, timeout=400)
        assert run.failures() == {"rank 0": 6}, run.logs()
        log = run.log("rank 0")
        assert "client client-01 disconnected: its process has ended" in log
        assert log.splitlines()[-1] == "fedbert-ds: client-01 was killed by signal 9", log
        trained = run.num_windows
        (saved,) = (run.run_folder / "checkpoints").glob("window-*/complete.json")
        assert json.loads(saved.read_text()) and saved.parent.name.endswith(str(trained))


@pytest.mark.parametrize("on_loss", ["continue", "wait"])
def test_a_run_that_can_goes_on_after_a_local_client_was_killed(tmp_path: Path, on_loss: str) -> None:
    """Without it, or with it: it is started again."""
    with federation(tmp_path, on_loss=on_loss, minimum=1) as run:
        run.start_ranks(1)
        run.wait(lambda: run.num_windows >= 2, timeout=400)
        kill_client(run, "client-01")
        run.wait(lambda: not run.is_running, timeout=400)
        assert run.failures() == {}, run.logs()
    rows = run.metrics()
    assert [row["window"] for row in rows] == list(range(60))
    lost = [row["window"] for row in rows if row["lost_masked_tokens"]]
    assert on_loss == "continue" or not lost
