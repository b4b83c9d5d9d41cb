"""Which checkpoints count: complete ones, the newest two, however a run ends."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedbert_ds.server.rank_group import COMPLETE, RankGroup, complete_windows, ranks_of_checkpoints


@pytest.fixture
def rank_group(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A RankGroup of rank 0 of 3 whose barriers need nobody; `barriers` counts them."""
    made: Any = RankGroup.__new__(RankGroup)
    made.rank, made.world_size, made.barriers = 0, 3, 0

    def barrier() -> None:
        made.barriers += 1

    monkeypatch.setattr(made, "barrier", barrier, raising=False)
    return made


def written(folder: Path, window: int) -> Path:
    """What DeepSpeed leaves before the checkpoint is complete."""
    part = folder / f"window-{window}"
    part.mkdir(parents=True, exist_ok=True)
    (part / "optimizer.pt").write_bytes(b"x")
    return part


def test_a_checkpoint_counts_once_all_ranks_have_written(tmp_path: Path, rank_group: Any) -> None:
    assert complete_windows(tmp_path) == frozenset() and ranks_of_checkpoints(tmp_path) is None
    written(tmp_path, 5)
    assert complete_windows(tmp_path) == frozenset()
    rank_group.complete_checkpoint(tmp_path, 5)
    assert complete_windows(tmp_path) == {5} and ranks_of_checkpoints(tmp_path) == 3
    assert rank_group.barriers == 2, "before the mark, and before anybody goes on"


def test_only_rank_0_marks(tmp_path: Path, rank_group: Any) -> None:
    rank_group.rank = 1
    written(tmp_path, 5)
    rank_group.complete_checkpoint(tmp_path, 5)
    assert complete_windows(tmp_path) == frozenset() and rank_group.barriers == 2


def test_the_newest_two_are_kept(tmp_path: Path, rank_group: Any) -> None:
    for window in (9, 10, 200):
        written(tmp_path, window)
        rank_group.complete_checkpoint(tmp_path, window)
    assert complete_windows(tmp_path) == {10, 200}, "by number, not by name"
    assert {path.name for path in tmp_path.iterdir()} == {"window-10", "window-200"}


def test_an_incomplete_checkpoint_is_neither_counted_nor_removed(tmp_path: Path, rank_group: Any) -> None:
    written(tmp_path, 1)
    for window in (2, 3, 4):
        written(tmp_path, window)
        rank_group.complete_checkpoint(tmp_path, window)
    assert complete_windows(tmp_path) == {3, 4}
    assert (tmp_path / "window-1").is_dir()


def test_a_crash_while_removing_leaves_no_half_checkpoint_that_counts(
    tmp_path: Path, rank_group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(folder: Path) -> None:
        (folder / "optimizer.pt").unlink()
        raise KeyboardInterrupt

    for window in (1, 2):
        written(tmp_path, window)
        rank_group.complete_checkpoint(tmp_path, window)
    written(tmp_path, 3)
    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        rank_group.complete_checkpoint(tmp_path, 3)
    assert complete_windows(tmp_path) == {2, 3}


def test_a_crash_while_marking_leaves_an_incomplete_checkpoint(
    tmp_path: Path, rank_group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = written(tmp_path, 1)

    def full_disk(self: Path, text: str, encoding: str) -> None:
        self.touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        rank_group.complete_checkpoint(tmp_path, 1)
    assert not (part / COMPLETE).exists()
    assert complete_windows(tmp_path) == frozenset()
