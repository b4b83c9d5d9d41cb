"""A rank that is frozen or gone is lost in time; one that is slow, done or suspended is not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.server.heartbeat import BEAT_SECONDS, DONE, MOST_MISSED, RANK_LOST, Heartbeat, Silences

RANK = """
import sys, time
import torch.distributed as dist
from fedbert_ds.server.heartbeat import Heartbeat

rank, port, life = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
store = dist.TCPStore("127.0.0.1", port, 2, rank == 0)
where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
heart = Heartbeat(rank, 2, where, seconds=0.1, most_missed=9)
heart.start()
print("beats", flush=True)
time.sleep(life)
heart.stop()
print("done", flush=True)
if rank == 0:
    time.sleep(life + 2)
"""


class Ranks:
    """Two of them, which live for so many seconds."""

    def __init__(self, *lives: float) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(rank), str(port), str(life)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank, life in enumerate(lives)
        ]
        for process in self.processes:
            assert process.stdout is not None and process.stdout.readline() == "beats\n"
        time.sleep(1.0)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def started() -> Iterator[list[Ranks]]:
    found: list[Ranks] = []
    yield found
    for ranks in found:
        ranks.end()


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_frozen_or_gone_ends_the_other(started: list[Ranks], lost: int, how: signal.Signals) -> None:
    """Rank 0 has the store, so with it nobody is heard."""
    ranks = Ranks(1000.0, 1000.0)
    started.append(ranks)
    ranks.processes[lost].send_signal(how)
    other = ranks.processes[1 - lost]
    assert other.wait(timeout=100) == RANK_LOST
    assert other.stderr is not None
    told = [line for line in other.stderr.read().splitlines() if line.startswith("fedbert-ds: ")]
    assert told == [
        f"fedbert-ds: rank {lost}: silent for 1 s, frozen or cut off; the run ends, what is saved stays: start it "
        "again with --resume"
    ]


def test_a_rank_that_is_done_is_not_missed(started: list[Ranks]) -> None:
    ranks = Ranks(5.0, 1.5)
    started.append(ranks)
    for process in ranks.processes:
        assert process.stdout is not None and process.stdout.readline() == "done\n"
        assert process.wait(timeout=60) == 0


def test_ranks_that_are_suspended_together_have_missed_nothing(started: list[Ranks]) -> None:
    """SLURM suspends a job for a more urgent one."""
    ranks = Ranks(12.0, 12.0)
    started.append(ranks)
    for process in ranks.processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(4.0)
    for process in ranks.processes:
        process.send_signal(signal.SIGCONT)
    assert [process.wait(timeout=60) for process in ranks.processes] == [0, 0]


def test_a_rank_is_lost_after_a_minute() -> None:
    assert (MOST_MISSED + 2) * BEAT_SECONDS == 60.0


def test_one_rank_listens_to_nobody() -> None:
    heart = Heartbeat(0, 1, {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"}, seconds=0.01)
    heart.start()
    heart.stop()


@given(st.lists(st.sampled_from(["new", "old", "none", "done"]), max_size=40), st.integers(0, 6))
def test_lost_is_who_said_nothing_new_for_too_many_beats(heard: list[str], most_missed: int) -> None:
    silences = Silences([1, 2])
    number, missed, last, is_done = 0, 0, None, False
    for beats, what in enumerate(heard):
        number += what == "new"
        beat = {"new": str(number), "old": last, "done": DONE, "none": None}[what]
        silences.hear({2: str(beats)} | ({1: beat} if beat is not None else {}))
        is_done = beat == DONE or (is_done and beat is None) or (is_done and what == "old")
        missed = 0 if what == "new" or is_done else missed + 1
        last = beat if beat is not None else last
        assert silences.lost(most_missed) == ([1] if missed > most_missed else [])
