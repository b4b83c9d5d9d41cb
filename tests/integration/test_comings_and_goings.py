"""Clients that join late, leave, return, change their text in a run under way: real programs."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from integration.cluster import run_file, write_text
from integration.federation import Federation, fork_quickly

from fedbert_ds.data.corpus import Article
from fedbert_ds.data.shards import write_shard
from fedbert_ds.errors import INTERRUPTED, WireError
from fedbert_ds.evaluation.masked_lm import evaluate_masked_lm

pytestmark = pytest.mark.timeout(600)
fork_quickly()

SIX = ("ada", "bo", "cy", "di", "eve", "flo")
WORDS = [a + b + c for a in "bdfg" for b in "aeiou" for c in ("", "n", "r")]


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with the text of three clients and a tokenizer."""
    write_text(tmp_path)
    return tmp_path


def federation(place: Path, names: Sequence[str] = ("ada", "bo"), **sections: Any) -> Federation:
    who = {"expected": len(names), "join_timeout": 90, "reconnect_timeout": 0.5} | sections.pop("clients", {})
    tree = run_file(
        place,
        "run",
        model={"num_hidden_layers": 2},
        clients=who,
        **{"run": {"windows": 40, "save_every": 1000}, "window": {"tokens": 300}} | sections,
    )  # fmt: skip
    return Federation(place, tree, {client: str(place / f"{client}.jsonl") for client in names})


def article(number: int, rng: random.Random) -> Article:
    """Sentences in which each word says much about the next: there is something to learn."""
    words = [rng.choice(WORDS)]
    for _ in range(80):
        words.append(WORDS[(WORDS.index(words[-1]) * 7 + rng.randint(1, 3)) % len(WORDS)])
    return Article(str(number), " ".join(words))


def test_below_the_minimum_a_run_saves_and_waits(place) -> None:
    with federation(place) as run:
        run.start_ranks(1)
        run.await_server()
        run.start_client("ada")
        run.start_client("bo")
        run.wait(lambda: run.num_windows >= 3)
        run.kill("bo")
        run.wait(lambda: "waiting for clients" in run.log("rank 0"))
        waited_at = run.num_windows
        assert [path.name for path in (run.run_folder / "checkpoints").glob("window-*/complete.json")]
        time.sleep(1.0)
        assert run.num_windows == waited_at, "a window ran below clients.minimum"
        shutil.rmtree(run.state("bo"), ignore_errors=True)
        run.start_client("bo")
        run.wait(lambda: not run.is_running)
        assert run.failures() == {}, run.logs()
    assert [row["window"] for row in run.metrics()] == list(range(40))


def test_nobody_comes_back(place) -> None:
    with federation(place, clients={"join_timeout": 15}) as run:
        run.start_ranks(1)
        run.await_server()
        run.start_client("ada")
        run.start_client("bo")
        run.wait(lambda: run.num_windows >= 3)
        run.kill("bo")
        run.wait(lambda: "rank 0" in run.failures())
    last = run.log("rank 0").splitlines()[-1]
    assert "1 of 2 clients left, the run needs 2 (clients.minimum); saved up to window" in last, run.logs()


def test_a_client_that_missed_the_last_saves_keeps_no_run_from_resuming(place) -> None:
    """Its own state is older than every checkpoint that is left; the others' are not."""
    sections = {"run": {"windows": 60, "save_every": 2}, "federation": {"mode": "parallel", "average_every": 2}}
    with federation(place, ("ada", "bo", "cy"), clients={"minimum": 2}, **sections) as run:
        checkpoints = run.run_folder / "checkpoints"

        def oldest() -> int:
            return min((int(path.parent.name[7:]) for path in checkpoints.glob("window-*/complete.json")), default=0)

        run.start_ranks(1)
        run.await_server()
        for client in run.data:
            run.start_client(client)
        run.wait(lambda: run.num_windows >= 3)
        run.kill("bo")
        lost_at = run.num_windows
        run.wait(lambda: oldest() > lost_at + 2)
        run.stop_ranks()
        run.wait(lambda: "rank 0" in run.failures())
        run.start_ranks(1, resume=True)
        run.start_client("bo")
        run.wait(lambda: not run.is_running)
        assert run.failures() == {}, run.logs()
    rows = run.metrics()
    assert [row["window"] for row in rows] == list(range(60)) and rows[-1]["clients"] == 3


@pytest.mark.parametrize("reconnect_timeout", [0.5, 3600])
def test_the_address_of_a_server_that_was_killed_misleads_nobody(place, reconnect_timeout: float) -> None:
    """Clients look again until the file names the one that is there. However long they would dial
    the old one, they join the new one as soon as it has written the file.
    """
    clients = {"reconnect_timeout": reconnect_timeout}
    with federation(place, run={"windows": 60, "save_every": 2}, clients=clients) as run:
        run.start_ranks(1)
        run.await_server()
        run.start_client("ada")
        run.start_client("bo")
        run.wait(lambda: run.num_windows >= 3)
        address = run.run_folder / "server.address"
        dead = address.read_text()
        run.kill("rank 0")
        assert address.read_text() == dead, "nobody was left to remove it"
        run.restart_ranks(1, resume=True)
        run.wait(lambda: not run.is_running, timeout=300)
        assert run.failures() == {}, run.logs()
        assert address.read_text() not in ("", dead)
    assert [row["window"] for row in run.metrics()] == list(range(60))


def test_who_inspects_a_run_is_told_what_it_sends_and_moves_nothing(place) -> None:
    """Before the clients are there, and while they train."""
    with federation(place, run={"windows": 30, "save_every": 1000}) as run:
        run.start_ranks(1)
        run.await_server()
        run.start_client("ada")
        run.inspect("early")
        run.wait(lambda: not run.processes["early"].is_alive())
        run.start_client("bo")
        run.wait(lambda: run.num_windows >= 3)
        run.inspect("late")
        run.wait(lambda: not run.is_running)
        assert run.failures() == {}, run.logs()
    rows = run.metrics()
    assert len(rows) == 30 and {row["clients"] for row in rows} == {2}
    for visitor in ("early", "late"):
        told = run.log(visitor)
        assert "it gets     of each sequence: its length" in told and "inferred    Each token's vector" in told, told


def test_two_processes_under_one_name(place) -> None:
    """The one that is here stays."""
    with federation(place, run={"windows": 100_000, "save_every": 1000}) as run:
        run.start_ranks(1)
        run.await_server()
        run.start_client("ada")
        run.start_client("bo")
        run.wait(lambda: run.num_windows >= 3)
        run.start_client("bo", process="another bo")
        run.wait(lambda: "another bo" in run.failures() or not run.processes["rank 0"].is_alive())
        assert "client bo is here already" in run.log("another bo"), run.logs()
        refused_at = run.num_windows
        run.wait(lambda: run.num_windows >= refused_at + 3 or not run.processes["rank 0"].is_alive())
        run.stop_ranks()
        run.wait(lambda: not run.processes["rank 0"].is_alive())
        assert run.failures() == {"another bo": WireError.exit_code, "rank 0": INTERRUPTED}, run.logs()
    rows = run.metrics()
    assert [row["window"] for row in rows] == list(range(len(rows))) and len(rows) >= refused_at + 3
    assert {row["clients"] for row in rows} == {2}


def test_a_client_returns_with_more_text(place) -> None:
    """It goes on where it was; the new text joins in its next epoch."""
    clients = {"on_loss": "wait"}
    with federation(place, clients=clients, run={"windows": 30, "save_every": 1000}) as run:
        run.start_ranks(1)
        run.await_server()
        run.start_client("ada")
        run.start_client("bo")
        run.wait(lambda: run.num_windows >= 3)
        run.kill("bo")
        rng = random.Random(1)
        with (place / "bo.jsonl").open("a") as file:
            for number in range(5):
                file.write(json.dumps({"title": "new", "text": article(number, rng).text}) + "\n")
        run.start_client("bo")
        run.wait(lambda: not run.is_running)
        assert run.failures() == {}, run.logs()
    assert not any(row["lost_masked_tokens"] for row in run.metrics())


def test_a_client_returns_with_less_text_to_another_machine(place) -> None:
    """Where it has no note of the text that the run has counted."""
    with federation(place, clients={"on_loss": "wait", "join_timeout": 20}) as run:
        run.start_ranks(1)
        run.await_server()
        run.start_client("ada")
        run.start_client("bo")
        run.wait(lambda: run.num_windows >= 6)
        run.kill("bo")
        lines = (place / "bo.jsonl").read_text().splitlines()
        (place / "bo.jsonl").write_text(lines[0] + "\n")
        shutil.rmtree(run.state("bo"))
        run.start_client("bo")
        run.wait(lambda: "bo" in run.failures())
    assert "go on with the same text, or more behind it" in run.log("bo").splitlines()[-1], run.logs()


def six_clients(place: Path, name: str) -> Federation:
    rng = random.Random(5)
    folder = place / name
    folder.mkdir()
    for client in SIX:
        write_shard(folder / f"{client}.jsonl", [article(number, rng) for number in range(12)])
    return federation(
        folder,
        SIX,
        run={"windows": 60, "save_every": 1000},
        window={"tokens": 600},
        tokenizer={"path": str(place / "tokenizer")},
        clients={"expected": 5, "minimum": 3, "maximum": 6},
    )


def held_out_loss(place: Path, run: Federation) -> float:
    rng = random.Random(9)
    text = place / "held_out.jsonl"
    write_shard(text, [article(number, rng) for number in range(20)])
    return evaluate_masked_lm(str(run.run_folder / "hf"), [str(text)], seed=1, sequence_length=32).loss


def test_six_clients_of_which_some_leave_return_and_join_late(place) -> None:
    """With another number of ranks at a resume; the result is as good as the undisturbed one's."""
    calm = six_clients(place, "calm")
    with calm:
        calm.start_ranks(2)
        calm.await_server()
        for client in SIX[:5]:
            calm.start_client(client)
        calm.wait(lambda: not calm.is_running)
        assert calm.failures() == {}, calm.logs()

    run = six_clients(place, "stormy")
    with run:
        run.start_ranks(2)
        run.await_server()
        for client in SIX[:5]:
            run.start_client(client)
        run.wait(lambda: run.num_windows >= 5)
        run.kill("bo", "cy")  # two leave
        run.wait(lambda: run.num_windows >= 10)
        run.start_client("flo")  # one joins late
        shutil.rmtree(run.state("bo"), ignore_errors=True)
        run.start_client("bo")  # one returns, without its folder
        run.wait(lambda: run.metrics()[-1]["clients"] == 5)
        run.stop_ranks()
        run.wait(lambda: not any(run.processes[f"rank {rank}"].is_alive() for rank in range(2)))
        stopped_at = run.num_windows
        assert 10 <= stopped_at < 60, run.logs()
        run.start_ranks(1, "clients.expected=5", resume=True)
        run.wait(lambda: not run.is_running)
        assert run.failures() == {}, run.logs()

    rows = run.metrics()
    assert [row["window"] for row in rows] == list(range(60))
    assert {3, 5} <= {row["clients"] for row in rows[5:stopped_at]}
    assert rows[-1]["clients"] == 5
    before, calm_loss, loss = rows[0]["loss"], held_out_loss(place, calm), held_out_loss(place, run)
    assert calm_loss < before - 0.5, "the undisturbed run has learned nothing"
    assert abs(loss - calm_loss) < 0.25 * (before - calm_loss), (before, calm_loss, loss)
