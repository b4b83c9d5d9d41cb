"""A file that is not as it was sealed is named, whatever happened to it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedbert_ds.seals import CHUNK_BYTES, damage_of, seal_of, seals_of, sync_tree


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "model.pt").write_bytes(b"weights" * 9)
    (tmp_path / "deep" / "er" / "empty").write_bytes(b"")
    (tmp_path / "deep" / "large").write_bytes(bytes(range(256)) * (CHUNK_BYTES // 128))
    return tmp_path


def test_a_seal_is_size_and_sha_256(folder: Path) -> None:
    seals = seals_of(folder)
    assert set(seals) == {"model.pt", "deep/er/empty", "deep/large"}
    for name, seal in seals.items():
        content = (folder / name).read_bytes()
        assert seal == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert seal == seal_of(folder / name)


def test_what_is_as_it_was_has_no_damage(folder: Path) -> None:
    seals = seals_of(folder)
    sync_tree(folder)
    (folder / "later").write_bytes(b"not looked at")
    assert damage_of(folder, seals) is None and damage_of(folder, {}) is None


def test_every_kind_of_damage_is_a_phrase(folder: Path) -> None:
    seals = seals_of(folder)
    (folder / "model.pt").write_bytes(b"weights" * 8)
    assert damage_of(folder, seals) == "model.pt has 56 bytes, saved were 63"
    (folder / "model.pt").write_bytes(b"WEIGHTS" * 9)
    assert damage_of(folder, seals) == "model.pt is not what was saved (SHA-256)"
    (folder / "model.pt").unlink()
    assert damage_of(folder, seals) == "model.pt cannot be read (No such file or directory)"
    (folder / "model.pt").mkdir()
    assert damage_of(folder, {"model.pt": seals["model.pt"]}) is not None


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(min_size=1, max_size=300), data=st.data())
def test_any_one_bit_that_flips_is_noticed(tmp_path: Path, content: bytes, data: st.DataObject) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    seals = seals_of(tmp_path)
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    assert damage_of(tmp_path, seals) == "file is not what was saved (SHA-256)"


def test_a_tree_is_synced_files_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("fedbert_ds.seals.sync", synced.append)
    sync_tree(folder)
    files = {folder / "model.pt", folder / "deep" / "large", folder / "deep" / "er" / "empty"}
    assert set(synced[:3]) == files
    assert set(synced[3:]) == {folder, folder / "deep", folder / "deep" / "er"}
