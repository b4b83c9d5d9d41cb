"""What clients learn from the file: the server's address, that it is away, that all is done."""

from __future__ import annotations

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


def test_an_address_is_no_file() -> None:
    assert address_file.look_up("gpu-1:29600") == "gpu-1:29600"


def test_whoever_waits_looks_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is back is found at once, however long the client would have waited."""
    file = tmp_path / "server.address"
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            address_file.reveal(file, "gpu-1:29600")

    monkeypatch.setattr(address_file, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: 0.0))
    address_file.await_change(str(file), 1000.0)
    assert naps == [address_file.LOOK_SECONDS] * 3
