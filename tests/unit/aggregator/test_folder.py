"""The aggregator's files: the newest two references, and which folder fits a start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedbert_ds.aggregator.folder import AggregatorFolder, folder_of
from fedbert_ds.errors import RunError
from fedbert_ds.federation.reference import Reference
from fedbert_ds.run_file import parse_config

SHAPES = {"table": (2, 2)}


def reference(window: int) -> Reference:
    return Reference(window, {"table": torch.full((2, 2), float(window))}, {"table": {"step": window}})


def test_the_newest_two_references_are_kept_and_come_back(tmp_path: Path) -> None:
    folder = AggregatorFolder(tmp_path)
    for window in (2, 4, 10):
        folder.save(window, reference(window), {"ada": (0.5, 3.0)})
    assert folder.saved_windows() == (4, 10)
    loaded, votes = folder.load(10, SHAPES)
    assert votes == {"ada": (0.5, 3.0)}
    assert loaded.version == 10 and torch.equal(loaded.weights["table"], reference(10).weights["table"])
    assert loaded.optimizer == {"table": {"step": 10}}


def test_a_run_that_goes_back_has_no_later_references(tmp_path: Path) -> None:
    """Otherwise the newest two could be two that the server never counted."""
    folder = AggregatorFolder(tmp_path)
    for window in (2, 4):
        folder.save(window, reference(window))
    assert folder.load(2, SHAPES)[0].version == 2
    assert folder.saved_windows() == (2,)


def test_a_damaged_reference_is_one_line(tmp_path: Path) -> None:
    folder = AggregatorFolder(tmp_path)
    folder.save(2, reference(2))
    (tmp_path / "reference-2.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"reference-2.safetensors: cannot be read"):
        folder.load(2, SHAPES)
    with pytest.raises(RunError, match=r"reference-3.safetensors: cannot be read"):
        folder.load(3, SHAPES)


def test_a_reference_with_flipped_bytes_is_told_and_the_one_before_taken(tmp_path: Path) -> None:
    folder = AggregatorFolder(tmp_path)
    for window in (2, 4):
        folder.save(window, reference(window))
    path = tmp_path / "reference-4.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    told: list[str] = []
    assert folder.whole_windows(told.append) == (2,)
    assert folder.load(4, SHAPES)[0].version == 4, "nothing else would notice"
    assert told == [f"{tmp_path}: reference-4.safetensors is not what was saved (SHA-256)"]


def test_a_run_that_begins_anew_keeps_nothing_of_the_one_before(tmp_path: Path) -> None:
    folder = AggregatorFolder(tmp_path)
    for window in (2, 4):
        folder.save(window, reference(window))
    folder.begin_at(3)
    assert folder.saved_windows() == (2,)
    folder.begin_at(0)
    assert folder.saved_windows() == ()


def test_a_folder_fits_a_start_or_a_resume(tmp_path: Path) -> None:
    folder = AggregatorFolder(tmp_path / "new")
    folder.check(resume=False)
    with pytest.raises(RunError, match="no run to resume here"):
        folder.check(resume=True)
    folder.save(2, reference(2))
    folder.check(resume=True)
    with pytest.raises(RunError, match="holds a run already"):
        folder.check(resume=False)


def test_the_folder_is_beside_the_runs_unless_named(tmp_path: Path) -> None:
    section = {"address": "127.0.0.1:5000", "secret": "secret"}
    tree: dict = {"run": {"directory": str(tmp_path / "run")}, "aggregator": section}
    assert folder_of(parse_config(tree, "test")).path == tmp_path / "run-aggregator"
    section["directory"] = str(tmp_path / "mine")
    assert folder_of(parse_config(tree, "test")).path == tmp_path / "mine"
