"""The README's command under DeepSpeed's launcher: Ctrl-C and a lost launcher save and end,
--resume goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from integration.cluster import run_file, write_text
from transformers import AutoModelForMaskedLM

from fedbert_ds.server.checkpoint_folder import CheckpointFolder

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Path]:
    """A run file. Whatever of its run is left in the end is killed: it would train for ever."""
    folder = tmp_path / "launcher"
    folder.mkdir()
    write_text(folder)
    tree = run_file(
        folder,
        "run",
        run={"windows": 100_000},
        data={"source": [str(folder / f"{client}.jsonl") for client in ("ada", "bo")], "sequence_length": 32},
        clients={"local": 2, "expected": 2, "join_timeout": 240},
        window={"tokens": 300},
    )
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    yield path
    for process in _processes(path):
        process.kill()


def test_interrupt_then_resume(config) -> None:
    run = config.parent / "run"
    process = _launch(config)
    _wait_for(lambda: _windows(run) >= 3, process, config)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=120)
    _wait_for(lambda: not _left(config), None, config)
    output = (config.parent / "output.log").read_text()
    assert "stopped and saved at window" in output and "--resume" in output, output[-3000:]
    stopped_at = _windows(run)
    assert max(CheckpointFolder(run / "checkpoints").complete_windows()) == stopped_at

    done = _launch(config, "--resume", f"run.windows={stopped_at + 2}")
    assert done.wait(timeout=240) == 0, (config.parent / "output.log").read_text()[-3000:]
    assert _windows(run) == stopped_at + 2
    assert (run / "report.html").is_file() and (run / "loss.png").is_file()
    assert AutoModelForMaskedLM.from_pretrained(run / "hf").config.hidden_size == 32
    assert "held-out loss" in (config.parent / "output.log").read_text()
    assert not _left(config)

    changed = _launch(config, "--resume", "model.hidden_size=64")
    assert changed.wait(timeout=120) != 0
    assert "model.hidden_size is" in (config.parent / "output.log").read_text()


def test_a_run_whose_launcher_is_killed_saves_and_ends(config: Path) -> None:
    """Before, ranks and clients trained on with nobody to stop them."""
    run = config.parent / "run"
    process = _launch(config)
    _wait_for(lambda: _windows(run) >= 3, process, config)
    process.kill()
    process.wait()
    _wait_for(lambda: not _left(config), None, config)
    output = (config.parent / "output.log").read_text()
    assert "warning the launcher is gone: the run saves and ends" in output, output[-3000:]
    assert "stopped and saved at window" in output, output[-3000:]
    assert max(CheckpointFolder(run / "checkpoints").complete_windows()) == _windows(run)


def _launch(config: Path, *arguments: str) -> subprocess.Popen:
    """Start the run as a terminal would, in a process group of its own."""
    deepspeed = shutil.which("deepspeed", path=str(Path(sys.executable).parent))
    assert deepspeed, "deepspeed is not installed beside this Python; run make setup"
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [deepspeed, "--num_gpus", "2", "--master_port", _free_port(), "launchers/pretrain.py"]
    command += ["--config", str(config), *arguments]
    with (config.parent / "output.log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _windows(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return json.loads(lines[-1])["window"] + 1 if lines else 0


def _left(config: Path) -> list[str]:
    """Commands of ranks and clients of this run that still run."""
    return [" ".join(process.info["cmdline"]) for process in _processes(config)]


def _processes(config: Path) -> list[psutil.Process]:
    here = str(config.parent)
    return [process for process in psutil.process_iter(["cmdline"]) if here in " ".join(process.info["cmdline"] or [])]


def _wait_for(condition, process: subprocess.Popen | None, config: Path) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        output = (config.parent / "output.log").read_text()
        assert process is None or process.poll() is None, output[-3000:]
        assert time.monotonic() < deadline, f"{_left(config)}\n{output[-3000:]}"
        time.sleep(0.2)
