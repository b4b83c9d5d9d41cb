"""The Makefile's decisions, read from what it would run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
INHERITED = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "VENV", "DEVICE", "PYTHON", "RANKS", "CONFIG", "ARGS"}
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Under `make test` this would be a make inside a make, with that one's flags.
    environment = {name: value for name, value in os.environ.items() if name not in INHERITED}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_one_variable_decides_between_pins_and_ordinary_builds(tmp_path):
    cpu = make("-n", "setup", "DEVICE=cpu", f"VENV={tmp_path / 'environment'}").stdout
    cuda = make("-n", "setup", "DEVICE=cuda", f"VENV={tmp_path / 'environment'}").stdout
    assert "--constraint constraints.txt" in cpu
    assert "[server,data,glue,dev]" in cpu
    assert "--constraint" not in cuda
    assert "[server,data,glue,dev,gpu]" in cuda


def test_no_usable_python_is_one_line(tmp_path):
    result = make("setup", "PYTHON=no-such-python", f"VENV={tmp_path / 'environment'}")
    assert result.returncode != 0
    assert result.stdout.splitlines() == [
        "make: no Python from 3.10 to 3.13 at no-such-python; install one or name it with PYTHON="
    ]


def test_python_without_venv_is_one_line(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -m ] && exit 1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    result = make("setup", f"PYTHON={python}", f"VENV={tmp_path / 'environment'}")
    assert result.returncode != 0
    assert "install python3-venv" in result.stdout.splitlines()[-1]


def test_nothing_is_done_twice(tmp_path):
    stamp = tmp_path / ".installed-cpu"
    stamp.touch()
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "python").touch()
    result = make("setup", "DEVICE=cpu", f"VENV={tmp_path}")
    assert (result.returncode, result.stdout) == (0, "")


def test_without_an_index_an_older_transformers_is_not_tried_and_said_so(tmp_path):
    binaries = tmp_path / "bin"
    binaries.mkdir()
    python = binaries / "python"
    python.write_text("#!/bin/sh\necho 'ERROR: no index' >&2\nexit 1\n")
    python.chmod(0o755)
    (tmp_path / ".installed-cpu").touch()
    result = make("DEVICE=cpu", f"VENV={tmp_path}", f"{tmp_path}/transformers-4/.installed")
    assert (result.returncode, result.stdout) == (0, "make: transformers 4 is not tried: ERROR: no index\n")
    assert not (tmp_path / "transformers-4").exists()
    # As pip does, so that the folder is there.
    python.write_text(f"#!/bin/sh\nmkdir {tmp_path}/transformers-4\n")
    result = make("DEVICE=cpu", f"VENV={tmp_path}", f"{tmp_path}/transformers-4/.installed")
    assert (result.returncode, result.stdout) == (0, "")
    assert (tmp_path / "transformers-4" / ".installed").is_file()


def test_ranks_follow_the_machine(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (tmp_path / ".installed-cpu").touch()
    command = make("-n", "pretrain", "DEVICE=cpu", "CUDA_VISIBLE_DEVICES=", f"VENV={tmp_path}", "ARGS=run.windows=3")
    expected = " --num_gpus 2 launchers/pretrain.py --config configs/default.yaml run.windows=3"
    assert command.stdout.startswith("deepspeed ")
    assert command.stdout.strip().endswith(expected)
    chosen = make("-n", "pretrain", "DEVICE=cpu", "CUDA_VISIBLE_DEVICES=1", f"VENV={tmp_path}")
    assert "--num_gpus" not in chosen.stdout


def test_the_slow_compile_check_takes_arguments(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (tmp_path / ".installed-cpu").touch()
    command = make("-n", "compile-check", "DEVICE=cpu", f"VENV={tmp_path}", "ARGS=--update")
    assert command.stdout == "python -m fedbert_kernels.compile_check --update\n"
