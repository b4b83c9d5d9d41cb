"""Runs are made once, ended with the command, gone on with where they were saved, and say what went
wrong."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedbert_ds.compare import runs
from fedbert_ds.compare.attempts import log_of
from fedbert_ds.compare.runs import RESULT, ClientCosts, Job, client_costs, finished, public_settings
from fedbert_ds.config import RunConfig
from fedbert_ds.errors import RunError
from fedbert_ds.run_file import parse_config


def test_costs_are_read_from_what_clients_print(tmp_path):
    logs = [tmp_path / name for name in ("a.txt", "b.txt")]
    assert client_costs([]) is None
    for log, name, memory, flops in zip(logs, "ab", (512, 688), ("0.45", "2.13"), strict=True):
        log.write_text(f"client {name}: the run is complete; peak memory {memory} MB, {flops} MFLOP per token\n")
    assert client_costs(logs) == ClientCosts(flops_per_token=2.13e6, peak_memory_mb=688)


def test_a_run_is_ended_with_the_bench(tmp_path):
    program = (
        "import signal, sys\nfrom pathlib import Path\nfrom fedbert_ds.compare.runs import run_to_end\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))\n"
        "child = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "run_to_end([sys.executable, '-c', child], Path(sys.argv[1]))\n"
    )
    log = tmp_path / "run.log"
    bench = subprocess.Popen([sys.executable, "-c", program, str(log)])
    try:
        deadline = time.monotonic() + 60
        while not (log.is_file() and log.read_text().strip()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        bench.terminate()
        assert bench.wait(timeout=60) == 143
    finally:
        bench.kill()
        bench.wait()
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def job(tmp_path: Path, *made_with: str, deepspeed: str = "{}", **sections: object) -> Job:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "zero.json").write_text(deepspeed)
    tree = {"run": {"directory": str(tmp_path / "run")}, "body": {"deepspeed": str(tmp_path / "zero.json")}}
    return Job("a run", parse_config(tree | sections, "test"), [], made_with)


def test_a_run_is_known_by_all_that_decides_its_result(tmp_path: Path) -> None:
    first = job(tmp_path).fingerprint
    assert job(tmp_path, optimizer={"lr": 1e-4}, cut="embeddings").fingerprint == first, "written out, but the default"
    assert job(tmp_path / "elsewhere").fingerprint == first, "the same settings in another place"
    for other in (
        job(tmp_path, optimizer={"lr": 2e-4}),
        job(tmp_path, "--patience", "3"),
        job(tmp_path, deepspeed='{"zero_optimization": {"stage": 1}}'),
    ):
        assert other.fingerprint != first


def interrupted(run: Job, commit: str | None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command of an attempt that has begun, saved two windows and was ended."""
    given: list[str] = []

    def end_it(command: Sequence[str], log: Path, device: str) -> int:
        given.extend(command)
        log.write_text("window 2\n")
        for name in ("config.yaml", "checkpoints/window-00000002/complete.json"):
            (run.folder.path / name).parent.mkdir(parents=True, exist_ok=True)
            (run.folder.path / name).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run_to_end", end_it)
    with pytest.raises(KeyboardInterrupt):
        finished(run, commit, dict)
    return given


def completed(run: Job, commit: str | None, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], dict[str, Any]]:
    """The command of the attempt that came to the end, and the result."""
    given: list[str] = []

    def end_well(command: Sequence[str], log: Path, device: str) -> int:
        given.extend(command)
        run.folder.path.mkdir(parents=True, exist_ok=True)
        log.touch()
        return 0

    monkeypatch.setattr(runs, "run_to_end", end_well)
    return given, finished(run, commit, lambda: {"held_out_loss": 5.0})


def test_an_interrupted_run_goes_on_where_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = replace(job(tmp_path), command=["train"], resumes=True)
    assert interrupted(run, "a" * 40, monkeypatch) == ["train"]
    assert interrupted(run, "a" * 40, monkeypatch) == ["train", "--resume"]
    given, result = completed(run, "b" * 40, monkeypatch)
    assert given == ["train", "--resume"]
    assert f"a run: goes on at window 2 of {run.config.run.windows}, output in" in capsys.readouterr().out
    assert result["commit"] == f"{'a' * 40}, {'b' * 40}", "who made a part of it is named"
    assert completed(run, None, monkeypatch) == ([], result), "it is complete"


def test_what_went_wrong_is_told_of_the_last_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(job(tmp_path), resumes=True)
    errors = iter(["fedbert-ds: the disk is full", "Killed"])

    def fail(command: Sequence[str], log: Path, device: str) -> int:
        run.folder.path.mkdir(exist_ok=True)
        run.folder.config.touch()
        with log.open("a") as output:
            output.write(f"window 1\n{next(errors)}\n")
        return 1

    monkeypatch.setattr(runs, "run_to_end", fail)
    with pytest.raises(RunError, match="a run: the disk is full"):
        finished(run, None, dict)
    with pytest.raises(RunError, match="a run: Killed"):
        finished(run, None, dict)


def test_an_interrupted_run_of_other_settings_or_of_plain_code_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in (replace(job(tmp_path, "--ranks"), resumes=True), job(tmp_path)):
        run = replace(job(tmp_path), command=["train"], resumes=True)
        interrupted(run, None, monkeypatch)
        given, result = completed(replace(other, command=["train"]), None, monkeypatch)
        assert given == ["train"] and result["commit"] is None
        assert not (run.folder.path / "config.yaml").exists() and not log_of(run.folder.path).read_text()
        (run.folder.path / RESULT).unlink()


def test_settings_for_a_record_name_no_place(tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "ward.jsonl").touch()
    config = job(
        tmp_path,
        tokenizer={"path": str(tmp_path / "words")},
        data={"source": [str(tmp_path / "ward.jsonl"), "hub:a/b:train"]},
        model={"checkpoint": "google-bert/bert-base-uncased"},
    ).config
    settings = public_settings(config)
    assert str(tmp_path) not in str(settings) and "directory" not in settings["run"]
    assert settings["data"]["source"] == ["ward.jsonl", "hub:a/b:train"]
    assert settings["tokenizer"]["path"] == "words"
    assert settings["model"]["checkpoint"] == "google-bert/bert-base-uncased"
    assert public_settings(RunConfig())["optimizer"]["lr"] == 1e-4
