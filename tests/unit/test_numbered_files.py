"""The newest two files are kept, and a file is the old one or the new one, with its seal."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbert_ds.errors import RunError
from fedbert_ds.numbered_files import SEAL, NumberedFiles


@pytest.fixture
def files(tmp_path: Path) -> NumberedFiles:
    return NumberedFiles(tmp_path / "folder", "state", ".pt")


def save(files: NumberedFiles, number: int, content: str) -> None:
    files.save(number, lambda path: path.write_text(content))


def test_the_newest_two_are_kept_and_later_ones_go(files: NumberedFiles) -> None:
    assert files.numbers() == () and files.whole(print) == ()
    for number, left in [(9, (9,)), (10, (9, 10)), (200, (10, 200)), (50, (10, 50)), (3, (3,))]:
        save(files, number, f"of {number}")
        assert files.numbers() == left == files.whole(print)
        names = {files.of(kept).name for kept in left}
        assert {path.name for path in files.folder.iterdir()} == names | {f"{name}{SEAL}" for name in names}
        assert files.of(number).read_text() == f"of {number}"


def test_a_file_of_before_there_were_seals_counts(files: NumberedFiles) -> None:
    files.folder.mkdir()
    files.of(4).write_text("old")
    assert files.damage(4) is None and files.whole(print) == (4,)


def test_a_process_that_dies_at_any_moment_leaves_a_whole_file(
    files: NumberedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each rename, of the seal and of the file."""
    save(files, 5, "old")
    for moment in (1, 2):
        moved = 0
        replace = Path.replace

        def dies(self: Path, target: Path, moment: int = moment, replace=replace) -> Path:
            nonlocal moved
            result = replace(self, target)
            moved += 1
            if moved == moment:
                raise KeyboardInterrupt
            return result

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "replace", dies)
            save(files, 5, f"new {moment}")
        assert files.whole(print) == (5,)
        assert files.of(5).read_text() == ("old" if moment == 1 else "new 2")


def test_what_is_not_whole_is_told_and_the_one_before_taken(files: NumberedFiles) -> None:
    told: list[str] = []
    for number in (1, 2):
        save(files, number, f"of {number}")
    files.of(2).write_text("xx 2")
    assert files.whole(told.append) == (1,)
    assert told == [f"{files.folder}: state-2.pt is not what was saved (SHA-256)"]
    files.of(1).write_text("")
    with pytest.raises(RunError, match=r"state-2\.pt is not what was saved .*, and nothing older is left; restore"):
        files.whole(told.append)


@pytest.mark.parametrize("seal", ["", "nonsense", "[]x", '[{"bytes": 4}]', "[3]", "3"])
def test_a_damaged_seal_is_damage(files: NumberedFiles, seal: str) -> None:
    save(files, 1, "of 1")
    (files.folder / f"state-1.pt{SEAL}").write_text(seal)
    assert files.damage(1) == f"state-1.pt{SEAL} cannot be read"
    save(files, 1, "again")
    assert files.damage(1) is None
