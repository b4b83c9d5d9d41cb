"""A benchmark's processes end when they are told to, or are ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedbert_ds.bench.process import end, environment, last_line, running, tell
from fedbert_ds.errors import RunError

SLEEPER = "import time; print('on', flush=True); time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPER}"


@pytest.mark.parametrize(("program", "code"), [(SLEEPER, -15), (STUBBORN, -9)])
def test_end(program: str, code: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"on\n"
    end(process, patience=0.5)
    assert process.returncode == code
    end(process, patience=0.5)  # once more does nothing
    process.stdout.close()


def test_gpus_are_hidden_from_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert environment("cpu")["CUDA_VISIBLE_DEVICES"] == "" and environment("cuda")["CUDA_VISIBLE_DEVICES"] == "3"
    assert environment("cuda")["OMP_NUM_THREADS"] == "1"


def test_a_program_is_told_where_its_server_is_once_it_runs(tmp_path: Path) -> None:
    """Its last line is its answer; what else it says is in the log."""
    program = "import sys; print('warming up'); print('oops', file=sys.stderr); print('server', sys.stdin.readline())"
    log = tmp_path / "log"
    with running([sys.executable, "-c", program], log, "cpu", answers=True) as client:
        assert last_line(client, log, "127.0.0.1:7\n") == "server 127.0.0.1:7"
    assert log.read_text() == "oops\n"


@pytest.mark.parametrize("program", ["print('half a result'); raise SystemExit(3)", "pass"])
def test_a_program_that_ends_without_a_result_is_told_with_its_log(tmp_path: Path, program: str) -> None:
    log = tmp_path / "log"
    with (
        running([sys.executable, "-c", program], log, "cpu", answers=True) as client,
        pytest.raises(RunError, match=f"see {log}"),
    ):
        last_line(client, log)


def test_a_program_that_has_ended_is_for_its_waiter_to_notice(tmp_path: Path) -> None:
    with running([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", "cpu") as clients:
        clients.wait()
        tell(clients, "127.0.0.1:7")
        assert clients.returncode == 3
