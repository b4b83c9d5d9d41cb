"""Environment variables of a rank: numbers where numbers are needed, else one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedbert_ds.errors import ConfigError
from fedbert_ds.server.environment import NUMBERS, check_numbers


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", ["", "abc", "-1", "1.5", "0x2", "²"])
def test_what_is_no_number_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^environment variable {name}={text}: a whole number is needed; set one"):
        check_numbers({name: text})


def test_numbers_and_what_is_not_set_pass() -> None:
    check_numbers({})
    check_numbers(dict.fromkeys(NUMBERS, "12") | {"OMP_NUM_THREADS": "4,2", "RANK": " 3 "})


def test_a_rank_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("run: {windows: 1}\n")
    command = [sys.executable, "-m", "fedbert_ds.server.pretrain", "--config", str(tmp_path / "run.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "abc"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert ended.returncode == ConfigError.exit_code
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("fedbert-ds: ")]
    assert "OMP_NUM_THREADS=abc" in line and "Traceback" not in ended.stderr
