"""One client for every shard, all in one process; one that fails does not stop the others."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from fedbert_ds.bench.pipeline import load
from fedbert_ds.client.session import ClientOptions
from fedbert_ds.errors import RunError


@pytest.mark.parametrize("fails", [False, True])
def test_every_shard_has_a_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    for name in ("ada", "bo"):
        (tmp_path / f"{name}.jsonl").touch()
    started: dict[str, ClientOptions] = {}
    both = threading.Barrier(2, timeout=30)

    def run_client(options: ClientOptions) -> int:
        both.wait()  # they run side by side
        started[options.name] = options
        if fails and options.name == "bo":
            raise RunError("no more room")
        return 0

    monkeypatch.setattr(load, "run_client", run_client)
    command = ["load", "--server", "127.0.0.1:7", "--shards", str(tmp_path), "--state", str(tmp_path / "state")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit_:
        load.main()
    assert exit_.value.code == ("bo: no more room" if fails else 0)
    assert set(started) == {"ada", "bo"}
    assert started["ada"].server == "127.0.0.1:7" and started["ada"].data == (str(tmp_path / "ada.jsonl"),)
    assert started["ada"].state_folder == tmp_path / "state" / "ada"
