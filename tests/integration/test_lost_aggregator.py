"""Runs whose aggregator is another party's and is lost, and comes back or does not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from integration.chaos import SAVE_EVERY, WINDOWS, outcome
from integration.chaos_process import Kill
from integration.cluster import CLIENTS, WORLD_SIZE, aggregator_section, run_file, write_text
from integration.federation import Federation, fork_quickly

pytestmark = pytest.mark.timeout(600)
fork_quickly()


def federation(folder: Path, on_loss: str = "continue", windows: int = WINDOWS, **clients: Any) -> Federation:
    folder.mkdir()
    data = write_text(folder, CLIENTS | {"dee": 3})
    tree = run_file(
        folder,
        "run",
        run={"windows": windows, "save_every": SAVE_EVERY},
        model={"num_hidden_layers": 2},
        window={"order": "fixed", "tokens": 400},
        optimizer={"lr": 0.01, "gradient_clipping": 0.05},
        clients={"on_loss": on_loss, "expected": 3, "minimum": 3, "join_timeout": 120,
                 "reconnect_timeout": 0.5} | clients,
        aggregator=aggregator_section(folder),
    )  # fmt: skip
    return Federation(folder, tree, data)


def start(run: Federation, kills: list[Kill] | None = None) -> None:
    run.start_aggregator(kills=kills or [])
    run.wait(lambda: "waiting for the server" in run.log("aggregator"))
    run.start_ranks(WORLD_SIZE, kills=kills or [])
    for client in CLIENTS:
        run.start_client(client)


def finish(run: Federation) -> None:
    run.wait(lambda: not run.is_running)
    assert run.failures() == {}, run.logs()


def secrets_in(run: Federation) -> dict[str, list[str]]:
    """Secrets in logs and in what the run writes, by file: the two parties', and sessions."""
    found = {}
    for path in run.folder.rglob("*"):
        # A run's id, which run.txt and text.json hold, is known to all.
        if path.is_file() and path.name not in ("secret", "run.txt", "text.json"):
            text = path.read_text(errors="replace")
            if seen := re.findall(r"a secret of two parties|\b[0-9a-f]{32}\b", text):
                found[str(path)] = seen
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = federation(tmp_path_factory.mktemp("undisturbed") / "run")
    with run:
        start(run)
        finish(run)
    return outcome(run.run_folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_that_loses_the_aggregator_takes_all_back_to_what_was_saved(
    tmp_path: Path, undisturbed: Any, rank: int
) -> None:
    run = federation(tmp_path / "run")
    with run:
        start(run, [Kill(f"rank {rank}", "line", 4)])
        finish(run)
        assert "is lost" in run.log("rank 0")
    assert outcome(run.run_folder) == undisturbed


def test_a_run_that_goes_on_without_clients_waits_for_its_aggregator(tmp_path: Path, undisturbed: Any) -> None:
    run = federation(tmp_path / "run")
    with run:
        start(run, [Kill("aggregator", "commit", 4)])
        run.wait(lambda: bool(run.failures()))
        run.wait(lambda: "waiting for it" in run.log("rank 0"))
        run.kill("aggregator")
        run.start_aggregator(resume=True)
        finish(run)
    assert outcome(run.run_folder) == undisturbed


def test_a_run_that_is_stopped_without_its_aggregator_resumes(tmp_path: Path, undisturbed: Any) -> None:
    """Resumed by one rank instead of two."""
    run = federation(tmp_path / "run", "wait")
    with run:
        start(run, [Kill("aggregator", "commit", 5)])
        run.wait(lambda: "s at most" in run.log("rank 0"))
        run.stop_ranks()
        run.wait(lambda: "rank 0" in run.failures())
        told = [line for line in run.log("rank 0").splitlines() if line.startswith("fedbert-ds: ")]
        assert len(told) == 1 and "the aggregator at" in told[0] and "both with --resume" in told[0], told
        run.kill("aggregator")
        run.start_aggregator(resume=True)
        run.start_ranks(1, resume=True)
        finish(run)
    assert [row["window"] for row in run.metrics()] == list(range(WINDOWS))
    losses = [float.fromhex(loss) for loss in undisturbed.losses]
    assert [row["loss"] for row in run.metrics()] == pytest.approx(losses, rel=1e-5)


def test_a_new_client_begins_with_the_aggregators_reference(tmp_path: Path) -> None:
    run = federation(tmp_path / "run", windows=40, maximum=4)
    with run:
        start(run)
        run.wait(lambda: run.num_windows >= 1)
        run.start_client("dee")
        finish(run)
        assert "client dee: client updates go to the aggregator" in run.log("dee")
    assert secrets_in(run) == {}
    rows = run.metrics()
    assert [row["window"] for row in rows] == list(range(40))
    assert (rows[0]["clients"], rows[-1]["clients"]) == (3, 4)
    assert not any(row["lost_masked_tokens"] for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
