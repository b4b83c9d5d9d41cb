"""Threads for codecs: as many as a rank has cores."""

from __future__ import annotations

import pytest

from fedbert_ds.server.network.codec_threads import codec_threads


@pytest.mark.parametrize(
    ("own", "allowed", "ranks", "threads"),
    [
        (0, 1, 1, 1), (0, 2, 8, 1), (0, 16, 1, 16), (0, 96, 8, 12), (0, 97, 8, 12), (0, 4, 0, 4), (0, 0, 1, 1),
        # Bound: nobody shares these.
        (12, 12, 8, 12), (1, 96, 8, 1),
    ],
)  # fmt: skip
def test_ranks_share_cores_and_none_goes_without(own: int, allowed: int, ranks: int, threads: int) -> None:
    assert codec_threads(range(own), range(allowed), ranks) == threads
