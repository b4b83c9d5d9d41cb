"""A client's checkpoint: whole or not at all, the newest two, one line when it cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedbert_ds.client.state import claim, load_state, run_of, save_state, saved_windows, whole_windows
from fedbert_ds.errors import RunError


def state(seed: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    return {
        "half": {"table": torch.randn(5, 3, generator=random)},
        "cursor": {"epoch": seed, "position": 4},
        "masked_seen": 17,
    }


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "client"
    assert saved_windows(folder) == ()
    save_state(folder, 20, state(1))
    back = load_state(folder, 20)
    assert torch.equal(back["half"].pop("table"), state(1)["half"]["table"])
    assert back == {"half": {}, "cursor": {"epoch": 1, "position": 4}, "masked_seen": 17}


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for count, window in enumerate((9, 10, 200), start=1):
        save_state(tmp_path, window, state(window))
        assert len(saved_windows(tmp_path)) == min(count, 2)
    assert saved_windows(tmp_path) == (10, 200), "by number, not by name"
    assert load_state(tmp_path, 10)["cursor"]["epoch"] == 10
    states = {"state-10.pt", "state-200.pt"}
    assert {path.name for path in tmp_path.iterdir()} == states | {f"{name}.seal.json" for name in states}


def test_saving_again_replaces(tmp_path: Path) -> None:
    for seed in (1, 2):
        save_state(tmp_path, 5, state(seed))
    assert load_state(tmp_path, 5)["cursor"]["epoch"] == 2


def test_a_save_that_fails_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, 5, state(1))

    def full_disk(content: object, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    for window in (5, 6):
        with pytest.raises(RunError, match="no space"):
            save_state(tmp_path, window, state(2))
    assert saved_windows(tmp_path) == (5,)
    assert load_state(tmp_path, 5)["cursor"]["epoch"] == 1


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in ("state-.pt", "state-old.pt", "state-3 (copy).pt", "state-7.pt.partial", "other-4.pt"):
        (tmp_path / name).write_bytes(b"x")
    save_state(tmp_path, 1, state(1))
    assert saved_windows(tmp_path) == (1,)
    for window in (2, 3):
        save_state(tmp_path, window, state(1))
    assert saved_windows(tmp_path) == (2, 3)
    assert (tmp_path / "state-old.pt").exists()


def test_a_missing_state_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"state-8\.pt: cannot be read \(FileNotFoundError\); give the --state folder"):
        load_state(tmp_path, 8)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\x00" * 1000])
def test_a_damaged_state_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state-8.pt").write_bytes(content)
    with pytest.raises(
        RunError, match=r"state-8\.pt: cannot be read .*; give the --state folder of the first run"
    ) as e:
        load_state(tmp_path, 8)
    assert len(str(e.value)) < 200 + len(str(tmp_path))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0.0, 0.999))
def test_a_state_that_was_cut_short_is_one_line(tmp_path: Path, share: float) -> None:
    save_state(tmp_path, 8, state(1))
    path = tmp_path / "state-8.pt"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(RunError, match="cannot be read"):
        load_state(tmp_path, 8)


def test_code_in_a_state_is_not_run(tmp_path: Path) -> None:
    """A pickle that would write a file when it is loaded."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"half": Evil()}, tmp_path / "state-8.pt")
    with pytest.raises(RunError, match="cannot be read"):
        load_state(tmp_path, 8)
    assert not (tmp_path / "owned").exists()


def test_a_state_with_flipped_bytes_is_told_and_the_one_before_taken(tmp_path: Path) -> None:
    """torch.load would take most of them."""
    for window in (3, 6):
        save_state(tmp_path, window, state(window))
    path = tmp_path / "state-6.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    told: list[str] = []
    assert whole_windows(tmp_path, told.append) == (3,) and saved_windows(tmp_path) == (3, 6)
    assert told == [f"{tmp_path}: state-6.pt is not what was saved (SHA-256)"]


def test_later_states_go_when_the_run_went_back_behind_them(tmp_path: Path) -> None:
    """Else the newest two would be ones that the server no longer has."""
    for window in (3, 6):
        save_state(tmp_path, window, state(window))
    save_state(tmp_path, 4, state(4))
    assert saved_windows(tmp_path) == (3, 4)
    save_state(tmp_path, 2, state(2))
    assert saved_windows(tmp_path) == (2,)


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    assert run_of(folder) == ""
    claim(folder, "first")
    claim(folder, "second")
    assert run_of(folder) == "second", "nothing was saved in the first"
    save_state(folder, 5, state(1))
    claim(folder, "second")
    with pytest.raises(RunError, match="holds states of another run; give another --state folder, or remove this one"):
        claim(folder, "third")
    assert run_of(folder) == "second" and saved_windows(folder) == (5,)


def test_states_without_a_run_are_not_taken_over(tmp_path: Path) -> None:
    save_state(tmp_path, 5, state(1))
    with pytest.raises(RunError, match="holds states of another run"):
        claim(tmp_path, "mine")
    assert run_of(tmp_path) == ""


def test_a_disk_that_takes_no_more_is_one_line_and_what_was_saved_stays(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    save_state(tmp_path, 1, state(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(RunError, match=r"cannot be written .* what was saved before is whole"):
            save_state(tmp_path, 2, {"weights": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved_windows(tmp_path) == (1,) and whole_windows(tmp_path, pytest.fail) == (1,)
    load_state(tmp_path, 1)
