"""A shelf returns what was put, to the bit, as copies, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedbert_ds.errors import RunError
from fedbert_ds.federation.shelf import Shelf

SHAPES = {"table": (5, 3), "scale": (), "bias": (4,)}


def test_tensors_come_back_as_copies_in_any_order(tmp_path: Path) -> None:
    shelf = Shelf(SHAPES, tmp_path / "state")
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    assert shelf.is_empty and shelf.get_all() == {}
    for name in ("bias", "table", "scale"):
        shelf.put(name, tensors[name])
    tensors["bias"] += 1.0
    shelf.put("bias", tensors["bias"])
    shelf.get("table").zero_()
    assert not shelf.is_empty
    for name, tensor in shelf.get_all().items():
        assert torch.equal(tensor, tensors[name])
    assert list((tmp_path / "state").iterdir()) == [], "the file ends with the process"


def test_what_was_not_put_is_not_there() -> None:
    shelf = Shelf(SHAPES)
    shelf.put_all({"bias": torch.ones(4)})
    with pytest.raises(KeyError):
        shelf.get("table")
    shelf.put_all({"table": torch.ones(5, 3)})
    assert shelf.get_all().keys() == {"table"}
    shelf.put_all({})
    assert shelf.is_empty


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="takes no temporary file"):
        Shelf(SHAPES, tmp_path / "file")
