"""Which files of a folder are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedbert_ds.data.folders import find


def is_text(path: Path) -> bool:
    return path.suffix == ".txt"


def made(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("so")


def test_files_come_by_name_and_the_others_are_counted(tmp_path: Path) -> None:
    made(tmp_path, "b.txt", "a/c.txt", "a/.c.txt", ".git/d.txt", "__MACOSX/a/._c.txt", "e.pdf", "f.PDF", "Makefile")
    found = find(tmp_path, is_text)
    assert found.files == [tmp_path / "a" / "c.txt", tmp_path / "b.txt"]
    assert found.left_out == {"hidden": 3, ".pdf": 2, "no suffix": 1}


def test_links_in_circles_and_to_nowhere_do_no_harm(tmp_path: Path) -> None:
    made(tmp_path, "a/b.txt")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "none.txt")
    found = find(tmp_path, is_text)
    assert found.files == [tmp_path / "a" / "b.txt"]
    assert found.left_out == {"no file: a link to nowhere, or a device": 1}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    made(tmp_path, "a.txt", "closed/b.txt")
    (tmp_path / "closed").chmod(0)
    try:
        found = find(tmp_path, is_text)
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert found.files == [tmp_path / "a.txt"] and found.left_out == {f"no permission: {tmp_path / 'closed'}": 1}


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without permission, where the tests run as root."""
    made(tmp_path, "a.txt", "closed/b.txt")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = find(tmp_path, is_text)
    assert found.files == [tmp_path / "a.txt"] and found.left_out == {f"no permission: {tmp_path / 'closed'}": 1}
