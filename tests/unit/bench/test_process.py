"""A benchmark's processes end when they are told to, or are ended."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedbert_ds.bench.process import end, environment

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(600)"
)


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
