"""A file is the old one or the new one, never part of either."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbert_ds.atomic_write import atomic_write, write_text


def test_the_new_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "facts.json"
    for text in ("one\n", "zwei, drei: ü\n"):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert [file.name for file in path.parent.iterdir()] == ["facts.json"]


def test_after_an_error_the_file_is_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    write_text(path, "whole")
    with pytest.raises(RuntimeError, match="disk full"), atomic_write(path) as partial:
        partial.write_text("ha")
        raise RuntimeError("disk full")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "mark"
    path.with_name("mark.partial").write_text("half a line, longer than what comes")
    write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_the_new_file_is_on_disk_before_it_takes_the_old_ones_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between the two leaves the old file."""
    order: list[str] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: order.append("on disk"))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append("renamed"), replace(self, target))[1])
    write_text(tmp_path / "state.pt", "new")
    assert order[:2] == ["on disk", "renamed"]
