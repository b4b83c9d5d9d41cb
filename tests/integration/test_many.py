"""Eight ranks and 24 clients, one of which is slow: right, and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from integration.cluster import ZERO, Centralized, run_file, write_text
from integration.federation import Federation, fork_quickly
from safetensors.torch import load_file

pytestmark = pytest.mark.timeout(900)
fork_quickly()

NUM_RANKS, NUM_CLIENTS = 8, 24
CLIENTS = {f"client-{number:02}": 2 + number % 5 for number in range(NUM_CLIENTS)}
"""Numbers of articles: unequal shards, so that ranks have unequal numbers of micro-batches."""
SLOW = "client-07"
AWAKE, ASLEEP = 0.1, 0.6
"""Seconds: the slow client gets a seventh of the time."""
TOLERANCE = 2e-5


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Starts a federation, lets it run to its end, with the slow client's naps; returns it."""
    data = write_text(tmp_path, CLIENTS)

    def finished(stage: int, **sections: Any) -> tuple[Federation, dict[str, str]]:
        tree = run_file(
            tmp_path,
            "run",
            model={"num_hidden_layers": 2},
            body={"deepspeed": str(ZERO / f"zero{stage}.json")},
            run={"windows": 4, "save_every": 2},
            clients={"expected": NUM_CLIENTS, "join_timeout": 300, "silence_timeout": 300},
            **{"optimizer": {"name": "sgd", "lr": 0.5, "schedule": "constant"}} | sections,
        )
        federation = Federation(tmp_path, tree, data)
        with federation:
            federation.start_ranks(NUM_RANKS)
            federation.await_server()
            for client in CLIENTS:
                federation.start_client(client)
            federation.wait(lambda: not federation.is_running, 600.0, meanwhile=lambda: nap(federation))
            assert federation.failures() == {}, federation.logs()
        return federation, data

    return finished


def nap(federation: Federation) -> None:
    """The slow client sleeps for a while."""
    pid = federation.processes[SLOW].pid
    assert pid is not None
    with suppress(ProcessLookupError):  # it has ended
        os.kill(pid, signal.SIGSTOP)
        time.sleep(ASLEEP)
        os.kill(pid, signal.SIGCONT)
        time.sleep(AWAKE)


def test_where_nobody_is_left_out_it_equals_centralized_training(run: Any) -> None:
    """Ranks meet in every forward and backward at ZeRO stage 3."""
    federation, data = run(3, window={"order": "fixed", "tokens": 2400})
    training = Centralized(dict(federation.tree), data)
    expected = training.train()
    got = load_file(federation.run_folder / "hf" / "model.safetensors")
    assert len(got) > 20
    for name, tensor in got.items():
        assert (tensor - expected[name]).abs().max() <= TOLERANCE, name
    assert all(row["lost_masked_tokens"] == 0 and row["clients"] == NUM_CLIENTS for row in federation.metrics())


def test_in_order_of_arrival_every_masked_token_is_trained_or_counted_as_lost(run: Any) -> None:
    federation, data = run(1, window={"order": "arrival", "tokens": 2400})
    rows = federation.metrics()
    assert [row["window"] for row in rows] == list(range(4))
    training = Centralized(dict(federation.tree), data)
    first = [stream.next_batch(0, training.shares[client]) for client, stream in training.streams.items()]
    assert rows[0]["masked_tokens"] + rows[0]["lost_masked_tokens"] == sum(len(batch.labels) for batch in first)
    for row in rows:
        parts = ("busy_seconds", "wait_seconds", "rank_wait_seconds", "saving_seconds", "host_seconds")
        assert sum(row[part] for part in parts) == pytest.approx(row["seconds"])
