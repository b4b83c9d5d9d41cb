"""Which checkpoints count, however a process ends and whatever happens to their files."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedbert_ds.errors import RunError
from fedbert_ds.server.checkpoint_folder import COMPLETE, CheckpointFolder, Layout


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "run" / "checkpoints")


def written(checkpoints: CheckpointFolder, window: int, size: int = 1) -> Path:
    """What DeepSpeed leaves before the checkpoint is complete."""
    part = checkpoints.draft.of(window)
    part.mkdir(parents=True, exist_ok=True)
    (part / "optimizer.pt").write_bytes(b"x" * size)
    return part


def complete(checkpoints: CheckpointFolder, *windows: int, size: int = 1) -> None:
    for window in windows:
        written(checkpoints, window, size)
        checkpoints.mark_complete(window, Layout(1, 0))


def flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_counts_once_it_is_marked(checkpoints: CheckpointFolder) -> None:
    assert checkpoints.complete_windows() == frozenset() == checkpoints.whole_windows(print)
    written(checkpoints, 5)
    assert checkpoints.complete_windows() == frozenset()
    checkpoints.mark_complete(5, Layout(3, 2))
    assert checkpoints.complete_windows() == {5} == checkpoints.whole_windows(print)
    assert checkpoints.layout(5) == Layout(ranks=3, zero_stage=2)


def test_the_newest_two_are_kept(checkpoints: CheckpointFolder) -> None:
    complete(checkpoints, 9, 10, 200)
    assert checkpoints.complete_windows() == {10, 200}, "by number, not by name"
    assert {path.name for path in checkpoints.path.iterdir()} == {"window-10", "window-200"}


def test_what_counts_is_never_written_to(checkpoints: CheckpointFolder) -> None:
    """A run that went back saves a window once more, and is killed while it writes."""
    complete(checkpoints, 5)
    written(checkpoints, 5, size=9)
    (checkpoints.draft.of(5) / "optimizer.pt").write_bytes(b"")
    assert checkpoints.whole_windows(print) == {5}
    assert (checkpoints.of(5) / "optimizer.pt").read_bytes() == b"x"
    complete(checkpoints, 5, size=3)
    assert (checkpoints.of(5) / "optimizer.pt").read_bytes() == b"xxx"
    assert {path.name for path in checkpoints.path.iterdir()} == {"window-5"}


@pytest.mark.parametrize("moment", range(1, 9))
def test_a_process_that_dies_while_it_completes_leaves_whole_checkpoints(
    checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """After every rename and every removal."""
    complete(checkpoints, 1, 2)
    written(checkpoints, 3)
    done = 0

    def counted(real: Any) -> Any:
        def called(*arguments: Any, **keywords: Any) -> Any:
            nonlocal done
            result = real(*arguments, **keywords)
            done += 1
            if done == moment:
                raise KeyboardInterrupt
            return result

        return called

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", counted(Path.replace))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            checkpoints.mark_complete(3, Layout(1, 0))
    except KeyboardInterrupt:
        pass
    whole = checkpoints.whole_windows(print)
    assert whole == checkpoints.complete_windows() and whole in ({1, 2}, {1, 2, 3}, {2, 3})
    checkpoints.begin_at(max(whole))
    complete(checkpoints, 7, 8)
    assert checkpoints.whole_windows(print) == {7, 8}


def test_a_crash_while_removing_leaves_no_half_checkpoint_that_counts(
    checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def crash(path: Path, ignore_errors: bool = False) -> None:
        if path.name != "window-1":
            return remove(path, ignore_errors)
        (path / "optimizer.pt").unlink()
        raise KeyboardInterrupt

    complete(checkpoints, 1, 2)
    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        complete(checkpoints, 3)
    assert checkpoints.complete_windows() == {2, 3}


def test_a_crash_while_marking_leaves_an_incomplete_checkpoint(
    checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = written(checkpoints, 1)

    def full_disk(self: Path, *_: Any, **__: Any) -> None:
        self.touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        checkpoints.mark_complete(1, Layout(1, 0))
    assert not (part / COMPLETE).exists()
    assert checkpoints.complete_windows() == frozenset()


def test_everything_is_on_disk_before_it_counts(checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr("fedbert_ds.server.checkpoint_folder.sync_tree", lambda path: order.append("parts"))
    monkeypatch.setattr("fedbert_ds.server.checkpoint_folder.sync", lambda path: order.append("place"))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append(target.name), replace(self, target))[1])
    complete(checkpoints, 5)
    assert order == ["parts", COMPLETE, "window-5", "place"]


def test_a_run_puts_aside_what_it_will_write_again(checkpoints: CheckpointFolder) -> None:
    """Another number of ranks writes other files: those of before would be left among them. A
    client that lied made the run go back: what it went behind is there until there is a new one.
    """
    complete(checkpoints, 3, 6)
    written(checkpoints, 9)
    for name in ("window-1", "window-notes"):
        (checkpoints.path / name).mkdir()
    checkpoints.begin_at(3)
    assert {path.name for path in checkpoints.path.iterdir()} == {"window-3", "window-notes", "undone"}
    assert checkpoints.complete_windows() == {3} and checkpoints.undone.whole_windows(print) == {6}
    checkpoints.begin_at(0)
    assert checkpoints.complete_windows() == frozenset()
    assert checkpoints.undone.whole_windows(print) == {3, 6}
    complete(checkpoints, 2)
    assert {path.name for path in checkpoints.path.iterdir()} == {"window-2", "window-notes"}
    CheckpointFolder(checkpoints.path / "nothing yet").begin_at(0)


@pytest.mark.parametrize("mark", ['{"window": 5, "ranks": 2}', "[]", "{", '{"ranks": 2, "zero_stage": "two"}'])
def test_a_mark_that_names_no_layout_is_one_line(checkpoints: CheckpointFolder, mark: str) -> None:
    complete(checkpoints, 5)
    (checkpoints.of(5) / COMPLETE).write_text(mark)
    with pytest.raises(RunError, match=r'complete\.json: says not by how many ranks .*; add "ranks"') as caught:
        checkpoints.layout(5)
    assert "\n" not in str(caught.value)


# -- damage ----------------------------------------------------------------------------------------


def damages(checkpoints: CheckpointFolder, window: int) -> dict[str, Any]:
    part = checkpoints.of(window)
    return {
        "optimizer.pt is not what was saved (SHA-256)": lambda: flip(part / "optimizer.pt"),
        "optimizer.pt has 0 bytes, saved were 1": lambda: (part / "optimizer.pt").write_bytes(b""),
        "optimizer.pt cannot be read (No such file or directory)": (part / "optimizer.pt").unlink,
        f"{COMPLETE} cannot be read": lambda: (part / COMPLETE).write_text("{"),
    }


@pytest.mark.parametrize("number", range(4))
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_whole(checkpoints: CheckpointFolder, number: int) -> None:
    complete(checkpoints, 3, 6)
    problem, damage = list(damages(checkpoints, 6).items())[number]
    damage()
    told: list[str] = []
    assert checkpoints.whole_windows(told.append) == {3}
    assert told == [f"{checkpoints.of(6)}: {problem}; it is left aside"]
    flip(checkpoints.of(3) / "optimizer.pt")
    with pytest.raises(RunError) as caught:
        checkpoints.whole_windows(told.append)
    assert str(caught.value) == (
        f"{checkpoints.of(6)}: {problem}, and no other checkpoint is whole; restore {checkpoints.path}, or start anew "
        "in another run.directory"
    )


def test_a_checkpoint_of_before_there_were_hashes_counts(checkpoints: CheckpointFolder) -> None:
    checkpoints.of(4).mkdir(parents=True)
    (checkpoints.of(4) / COMPLETE).write_text('{"window": 4, "ranks": 2, "zero_stage": 1}')
    assert checkpoints.whole_windows(print) == {4}


# -- room ------------------------------------------------------------------------------------------


def test_room_for_another_is_made_or_missed_in_one_line(
    checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    problem = checkpoints.make_room(10_000_000_000)
    assert problem is not None and "0 MB are free and a checkpoint takes 10,500 MB; free some space" in problem
    free = 11_000_000_000
    assert checkpoints.make_room(10_000_000_000) is None
    complete(checkpoints, 3, 6, size=2000)
    free = 2500
    assert checkpoints.make_room(10_000_000_000) is None, "another takes what the last one took"
    assert checkpoints.complete_windows() == {3, 6}
    free = 100
    assert checkpoints.make_room(0) is not None
    assert checkpoints.complete_windows() == {6}, "the newest stays, come what may"


def test_the_older_one_goes_for_a_new_one(checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    complete(checkpoints, 3, 6, size=2000)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=100 if checkpoints.of(3).exists() else 2500)
    )
    assert checkpoints.make_room(0) is None and checkpoints.complete_windows() == {6}
