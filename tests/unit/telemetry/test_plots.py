"""Pictures are written whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbert_ds.telemetry.plots import picture, short_ticks


def test_panels_come_row_by_row_and_the_picture_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "some.png"
    with picture(path, 4, 3, rows=2, columns=2) as (figure, panels):
        assert panels == list(figure.axes) and len(panels) == 4
        panels[0].plot([0, 5000], [1.0, 2.0])
        short_ticks(panels[0].xaxis)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in path.parent.iterdir()] == ["some.png"]
    assert panels[0].xaxis.get_major_formatter()(5000.0) == "5k"


def test_a_drawing_that_fails_leaves_the_old_picture(tmp_path: Path) -> None:
    path = tmp_path / "some.png"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), picture(path, 4, 3):
        raise ZeroDivisionError
    assert path.read_text() == "old"
