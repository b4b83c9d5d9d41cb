"""What clients learn from the file: the server's address, that it is away, that all is done."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedbert_ds.errors import RunOver, ServerAway
from fedbert_ds.wire import address_file


def test_it_tells_of_the_server_for_as_long_as_there_is_one(tmp_path: Path) -> None:
    file = tmp_path / "server.address"
    address_file.reveal(file, "gpu-1:29600")
    assert address_file.look_up(str(file)) == "gpu-1:29600"
    for _ in range(2):
        address_file.hide(file)
        with pytest.raises(ServerAway, match="no such file; is the server running") as away:
            address_file.look_up(str(file))
        assert not isinstance(away.value, RunOver)


def test_it_tells_that_a_run_is_complete_until_it_is_extended(tmp_path: Path) -> None:
    file = tmp_path / "server.address"
    address_file.close(file)
    with pytest.raises(RunOver, match=r"server\.address: the run is complete"):
        address_file.look_up(str(file))
    address_file.reveal(file, "gpu-2:29600")
    assert address_file.look_up(str(file)) == "gpu-2:29600"


@pytest.mark.parametrize("half", [b"", b"gpu", b"gpu-2:", b"comp", b"\xc3"])
def test_of_a_file_that_is_half_written_nobody_is_told_but_to_wait(tmp_path: Path, half: bytes) -> None:
    """As a run folder that is mirrored to another machine has it for a moment."""
    file = tmp_path / "server.address"
    address_file.reveal(file, "gpu-1:29600")
    is_news = address_file.news_of(str(file))
    file.write_bytes(half)
    assert not is_news()
    with pytest.raises(ServerAway, match=r"server\.address: no HOST:PORT can be read in it; copy it anew") as away:
        address_file.look_up(str(file))
    assert not isinstance(away.value, RunOver)


def test_an_address_is_no_file() -> None:
    assert address_file.look_up("gpu-1:29600") == "gpu-1:29600"


# -- news ------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of a server that started an hour ago."""
    path = tmp_path / "server.address"
    address_file.reveal(path, "gpu-1:29600")
    an_hour_ago = path.stat().st_mtime_ns - 3_600_000_000_000
    os.utime(path, ns=(an_hour_ago, an_hour_ago))
    return path


@pytest.mark.parametrize("address", ["gpu-2:29600", "gpu-1:29600"], ids=["elsewhere", "at its old port"])
def test_a_server_that_starts_is_news(file: Path, address: str) -> None:
    is_news = address_file.news_of(str(file))
    assert not is_news()
    address_file.reveal(file, address)
    assert is_news()
    assert not address_file.news_of(str(file))(), "to whom comes later it is none"


def test_the_end_of_a_run_is_news(file: Path) -> None:
    is_news = address_file.news_of(str(file))
    address_file.close(file)
    assert is_news()


def test_a_server_that_hands_over_is_no_news_and_the_next_one_is(file: Path) -> None:
    known = address_file.news_of(str(file))
    address_file.hide(file)
    unknown = address_file.news_of(str(file))
    assert not known() and not unknown()
    address_file.reveal(file, "gpu-1:29600")
    assert known() and unknown()


def test_a_file_that_was_moved_with_its_time_is_no_news(file: Path, tmp_path: Path) -> None:
    """As when a run folder is mirrored to another machine."""
    is_news = address_file.news_of(str(file))
    Path(shutil.copy2(file, tmp_path / "copy")).replace(file)
    assert not is_news()


def test_of_an_address_there_is_no_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    is_news = address_file.news_of("gpu-1:29600")
    address_file.reveal(Path("gpu-1:29600"), "a file of that name")
    assert not is_news()


def test_whoever_waits_looks_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is back is found at once, however long the client would have waited."""
    file = tmp_path / "server.address"
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            address_file.reveal(file, "gpu-1:29600")

    is_news = address_file.news_of(str(file))
    monkeypatch.setattr(address_file, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: 0.0))
    address_file.await_news(is_news, 1000.0)
    assert naps == [address_file.LOOK_SECONDS] * 3
    address_file.await_news(is_news, 1000.0)
    assert len(naps) == 3, "what came before the wait counts, too"
