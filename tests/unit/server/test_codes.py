"""Codes through the server, up and down, change no bit: neither of a message nor of the weights."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)
CODECS = ("fp32", "bf16", "int8", "int8_group", "fp8_e4m3", "fp8_e5m2", "int4_hadamard")
Case = tuple[tuple[str, str, str], str, int, str, str]
CASES: list[Case] = [((codec,) * 3, cut, 1, "fp32", "") for codec in CODECS for cut in ("embeddings", "rows")]
CASES += [
    (("fp8_e4m3", "int8", "fp8_e5m2"), "rows", 0, "bf16", ""),
    (("int8",) * 3, "embeddings", 2, "bf16", ""),
    (("int8",) * 3, "rows", 3, "fp32", ""),
    (("int4_hadamard", "int8", "bf16"), "embeddings", 3, "bf16", ""),
]
FAULTS: list[Case] = [
    (("int8",) * 3, "embeddings", 1, "fp32", "rounded"),
    (("int8",) * 3, "rows", 1, "fp32", "pieces in another order"),
]


@pytest.fixture(scope="module")
def told() -> dict[Case, Any]:
    """What the worker tells of each case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    environment = {**os.environ, **alone, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("codes_worker.py")), json.dumps(CASES + FAULTS)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"messages"')]
    return dict(zip(CASES + FAULTS, rows, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_messages_and_weights_are_as_before(told: dict[Case, Any], case: Case) -> None:
    """Two windows, two clients; one gradient is missing, and its client hears nothing."""
    assert told[case] == {"messages": 15, "other messages": 0, "other weights": []}


@pytest.mark.parametrize("case", FAULTS, ids=str)
def test_a_number_that_changes_is_noticed(told: dict[Case, Any], case: Case) -> None:
    assert told[case]["other messages"] and told[case]["other weights"]
