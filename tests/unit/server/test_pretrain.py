"""A rank's command line: a mistake is one line and an exit code, before anything starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedbert_ds.errors import NO_ROOM
from fedbert_ds.run_file import parse_config
from fedbert_ds.server import pretrain
from fedbert_ds.server.run_folder import RunFolder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("sys.argv", ["pretrain", *arguments])
    with pytest.raises(SystemExit) as end:
        pretrain.main()
    assert isinstance(end.value.code, int)
    return end.value.code


def test_a_missing_run_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--config", "nowhere.yaml") == 2
    assert capsys.readouterr().err == "fedbert-ds: nowhere.yaml: no such run file; give one with --config\n"


def test_overrides_may_stand_anywhere_and_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "zero.json").write_text("{}")
    path = tmp_path / "run.yaml"
    path.write_text("body: {deepspeed: zero.json}")
    assert run(monkeypatch, "run.windoes=3", "--config", str(path), "--local_rank", "0", "data.alpha=1") == 2
    assert "run.windoes is not a key; did you mean run.windows?" in capsys.readouterr().err


def test_the_folder_is_checked_before_the_rank_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "zero.json").write_text("{}")
    path = tmp_path / "run.yaml"
    path.write_text(f"body: {{deepspeed: zero.json}}\nrun: {{directory: {tmp_path}}}")
    assert run(monkeypatch, "--config", str(path)) == 6
    assert "holds a run already; add --resume" in capsys.readouterr().err


def test_a_restart_resumes_a_run_that_had_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config({"run": {"directory": str(tmp_path / "run")}}, "test")
    RunFolder(config.run.directory).write_config(config)
    assert not pretrain.is_restart(config)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert pretrain.is_restart(config)
    RunFolder(config.run.directory).remove()
    assert not pretrain.is_restart(config), "it died before it had begun"


@pytest.mark.parametrize("number", NO_ROOM)
def test_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def run_out(*_: object) -> None:
        raise OSError(number, os.strerror(number), "runs/a/metrics.jsonl")

    monkeypatch.setattr(pretrain, "load_config", run_out)
    assert run(monkeypatch, "--config", "run.yaml") == 6
    told = capsys.readouterr().err
    assert told.startswith(f"fedbert-ds: runs/a/metrics.jsonl: {os.strerror(number)}; what was saved is whole: ")
