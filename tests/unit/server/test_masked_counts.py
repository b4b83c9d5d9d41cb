"""Weights of updates are the masked tokens of planned windows, round by round."""

from __future__ import annotations

from fedbert_ds.server.masked_counts import MaskedCounts
from fedbert_ds.wire.messages import Manifest


def manifest(client: str, *masked: int) -> Manifest:
    return Manifest(client, 0, tuple(9 for _ in masked), masked)


def test_what_is_behind_an_update_is_what_was_planned_since_the_last_one() -> None:
    counts = MaskedCounts()
    counts.begin([manifest("ada", 1, 2), manifest("bo", 5)])
    counts.commit(is_exchanged=False)
    counts.begin([manifest("ada", 4)])
    assert counts.behind_updates(["ada", "bo", "cy"], least=1) == {"ada": 7, "bo": 5, "cy": 1}
    counts.commit(is_exchanged=True)
    counts.begin([manifest("bo", 3)])
    assert counts.behind_updates(["ada", "bo"]) == {"ada": 0, "bo": 3}
    assert counts.totals(["ada", "bo", "cy"]) == {"ada": 7, "bo": 5}, "the running window is not trained yet"


def test_a_window_that_is_undone_counts_once() -> None:
    counts = MaskedCounts({"ada": (10, 4)})
    counts.begin([manifest("ada", 2)])
    counts.begin([manifest("ada", 2)])
    assert counts.behind_updates(["ada"]) == {"ada": 6}
    counts.commit(is_exchanged=False)
    assert counts.committed == {"ada": (12, 6)}
    counts.roll_back({"ada": (10, 4)})
    assert counts.behind_updates(["ada"]) == {"ada": 4}


def test_older_counts_of_other_ranks_clients_are_not_told() -> None:
    """A rank that resumes reads every client's from the checkpoint and counts on its own."""
    counts = MaskedCounts()
    counts.roll_back({"ada": (10, 4), "bo": (20, 4)})
    counts.begin([manifest("ada", 2)])
    counts.commit(is_exchanged=False)
    assert counts.totals(["ada"]) == {"ada": 12}
