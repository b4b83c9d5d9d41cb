"""Threads for codecs: the cores that a rank has, shared with the ranks beside it."""

from __future__ import annotations

import os

import pytest

from fedbert_ds.server.network.codec_threads import codec_threads, codec_threads_here


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"), [(1, 1, 1), (2, 8, 1), (16, 1, 16), (96, 8, 12), (97, 8, 12), (4, 0, 4)]
)
def test_ranks_share_cores_and_none_goes_without(cores: int, ranks: int, threads: int) -> None:
    assert codec_threads(cores, ranks) == threads


def test_cores_and_ranks_are_those_of_this_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    for environment, threads in ({}, 12), ({"WORLD_SIZE": "3"}, 4), ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, 6):
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert codec_threads_here() == threads
