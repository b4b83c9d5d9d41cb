"""Runs are made once, ended with the command, and say what went wrong."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedbert_ds.compare.runs import ClientCosts, Job, client_costs, public_settings
from fedbert_ds.config import RunConfig, parse_config


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
