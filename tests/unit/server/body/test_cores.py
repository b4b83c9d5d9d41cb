"""A node's cores among its ranks: every core once, near the GPU, as launched where it was bound."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.server.body.cores import (
    Place,
    allowed_cores,
    children_on,
    codec_threads,
    cores_in,
    place_of,
    share_of,
    threads_asked_for,
    threads_for,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="cores are bound on Linux")


def cores(*bounds: int) -> frozenset[int]:
    return frozenset(range(*bounds))


def test_eight_gpus_on_two_sockets_share_the_cores_of_their_own() -> None:
    everything, first, second = cores(0, 128), cores(0, 32) | cores(64, 96), cores(32, 64) | cores(96, 128)
    places = [Place("a", everything, first if gpu < 4 else second) for gpu in range(8)]
    shares = [share_of(rank, places) for rank in range(8)]
    assert frozenset().union(*shares) == everything and sum(map(len, shares)) == 128
    assert all(share <= (first if rank < 4 else second) and len(share) == 16 for rank, share in enumerate(shares))


@given(
    num_cores=st.integers(1, 40),
    nears=st.lists(st.sampled_from(["low", "high", "unknown"]), min_size=1, max_size=9),
    nodes=st.integers(1, 3),
)
def test_no_core_is_given_twice_and_nobody_has_none(num_cores: int, nears: list[str], nodes: int) -> None:
    near = {"low": cores(num_cores // 2), "high": cores(num_cores // 2, num_cores), "unknown": frozenset[int]()}
    places = [Place(f"node {number % nodes}", cores(num_cores), near[kind]) for number, kind in enumerate(nears)]
    shares = [share_of(rank, places) for rank in range(len(places))]
    assert all(shares)
    for share, place in zip(shares, places, strict=True):
        assert share <= place.allowed
        alike = [other for other, its_place in zip(shares, places, strict=True) if its_place == place]
        if len(nears) <= len(place.near):
            assert sum(map(len, alike)) == len(frozenset().union(*alike)), "ranks that are as near share nothing"


def test_a_rank_that_its_launcher_bound_keeps_its_cores() -> None:
    places = [Place("a", cores(0, 8), cores(0, 16)), Place("a", cores(8, 16), cores(0, 16))]
    assert [share_of(rank, places) for rank in range(2)] == [cores(0, 8), cores(8, 16)]


def test_where_ranks_outnumber_cores_all_share_them() -> None:
    places = [Place("a", cores(2), frozenset())] * 4
    assert {share_of(rank, places) for rank in range(4)} == {cores(2)}


def test_a_system_that_does_not_tell_gives_no_cores_and_no_threads() -> None:
    assert share_of(0, [Place("a", frozenset(), frozenset())]) == frozenset()
    assert threads_for(frozenset(), {}) is None


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, 6),
        ({"OMP_NUM_THREADS": "3"}, None),
        ({"OMP_NUM_THREADS": "1"}, None),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 6),
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "none"}, None),
    ],
)
def test_what_the_user_asks_for_is_left_alone_and_torchruns_1_is_not(
    environment: dict[str, str], threads: int | None
) -> None:
    assert threads_for(cores(6), environment) == threads


def test_a_list_of_the_kernel(tmp_path: Path) -> None:
    file = tmp_path / "local_cpulist"
    file.write_text("0-2,8,10-11\n")
    assert cores_in(file) == {0, 1, 2, 8, 10, 11}
    file.write_text("\n")
    assert cores_in(file) == cores_in(tmp_path / "nothing") == frozenset()


@linux
def test_bound_threads_and_free_children() -> None:
    """In a process of its own: what is bound stays so."""
    program = (
        "import os, threading, subprocess, sys\n"
        "from fedbert_ds.server.body.cores import allowed_cores, bind, children_on\n"
        "before, gate, seen = allowed_cores(), threading.Event(), []\n"
        "early = threading.Thread(target=lambda: (gate.wait(), seen.append(allowed_cores())), daemon=True)\n"
        "early.start()\n"
        "one = frozenset([min(before)])\n"
        "bind(one)\n"
        "gate.set(); early.join()\n"
        "assert seen == [one] and allowed_cores() == one\n"
        "tell = [sys.executable, '-c', 'import os; print(sorted(os.sched_getaffinity(0)))']\n"
        "with children_on(before):\n"
        "    free = subprocess.run(tell, capture_output=True, text=True).stdout.strip()\n"
        "assert free == str(sorted(before)), free\n"
        "assert allowed_cores() == one\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 0, result.stderr


@linux
def test_without_cores_children_have_their_parents() -> None:
    before = allowed_cores()
    with children_on(frozenset()):
        assert allowed_cores() == before


@pytest.mark.parametrize(("num_cores", "ranks", "threads"), [(1, 1, 1), (2, 8, 1), (16, 1, 16), (97, 8, 12), (0, 1, 1)])
def test_ranks_share_the_threads_of_codecs_and_none_goes_without(num_cores: int, ranks: int, threads: int) -> None:
    places = [Place("a", cores(num_cores), frozenset())] * ranks + [Place("b", cores(num_cores), frozenset())]
    assert codec_threads(0, places) == threads


def test_who_is_bound_by_a_launcher_shares_no_threads() -> None:
    places = [Place("a", cores(6 * rank, 6 * rank + 6), frozenset()) for rank in range(8)]
    assert {codec_threads(rank, places) for rank in range(8)} == {6}


def test_a_rank_without_a_gpu_is_near_no_core() -> None:
    assert place_of("a", None) == Place("a", allowed_cores(), frozenset())


@pytest.mark.parametrize(("text", "threads"), [(None, None), ("4", 4), ("4,2", 4), ("0", 1)])
def test_threads_of_the_outermost_level(text: str | None, threads: int | None) -> None:
    assert threads_asked_for({} if text is None else {"OMP_NUM_THREADS": text}) == threads
