"""The body under DeepSpeed, on a device that notes waits, copies and collectives: the host waits
for no forward or backward, codes cross in place of values, and ranks meet once a window.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

from fedbert_kernels.encoded import form

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="torch before 2.10 makes no device of Python",
    ),
]
ROOT = Path(__file__).parents[4]
MICRO_BATCHES, COPY = 4, 10.0
"""As the worker and its device have them."""
STAGES, PRECISIONS = (0, 1, 2, 3), ("fp32", "bf16")
MUTATIONS = ("timers", "item", "pageable", "lengths", "one stream", "slow host")
CODECS = ("fp32", "bf16", "int8_group", "fp8_e4m3", "fp8_e5m2", "int4_hadamard")
"""Beside int8, which all other cases have."""
CASES = [(stage, precision, "int8", "") for stage in STAGES for precision in PRECISIONS]
CASES += [(1, "bf16", codec, "") for codec in CODECS]
CASES += [(1, "bf16", "int8", mutation) for mutation in MUTATIONS]
ACTIVATION_ROWS, MASKED, WIDTH, TOKENS, SEQUENCES = 20, 3, 32, 24, 3

Told = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def told() -> Told:
    """(stage, precision, codec, mutation) -> what the worker tells of its last window."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **alone, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(Path(__file__).with_name("waits_worker.py")), json.dumps(CASES)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"forwards"')]
    by_case = dict(zip(CASES, rows, strict=True))
    return lambda stage, precision, codec="int8", mutation="": by_case[stage, precision, codec, mutation]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_forwards_and_backwards_wait_for_nothing(told: Told, stage: int, precision: str) -> None:
    waits = told(stage, precision)
    assert waits["forwards"] == [] == waits["backwards"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_waits_for_the_norm_alone(told: Told, stage: int, precision: str) -> None:
    """Whether it is finite, and by how much it is to be clipped; DeepSpeed asks more than once, but
    not for each parameter. This server asks once, whether the rank's sums are finite.
    """
    waits = told(stage, precision)["step"]
    assert 1 <= len(waits) <= 9, waits


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_cross_ranks_once_a_window(told: Told, stage: int, precision: str) -> None:
    """In the step, as do the norm and the weights. What crosses: test_optimizer_step.py."""
    *before, step = told(stage, precision)["collectives"]
    assert before == [0] * (1 + MICRO_BATCHES)
    assert step <= 7


@pytest.mark.parametrize("stage", STAGES)
def test_copies_and_computation_are_beside_one_another(told: Told, stage: int) -> None:
    """Only the first micro-batch of a window waits for its uploads: codes and scales of two pieces,
    positions, row numbers.
    """
    assert told(stage, "bf16")["idle"] == 6 * COPY


@pytest.mark.parametrize("codec", ["int8", *CODECS])
def test_codes_cross_in_place_of_values(told: Told, codec: str) -> None:
    """Bytes by dtype, up and down, are those of the codec's own form; beside them go positions, row
    numbers and lengths up, int64.
    """
    crossed = told(1, "bf16", codec)["crossed"]
    expected: Counter[str] = Counter()
    for columns, dtype in (part for part in form(WIDTH, codec) if part):
        expected[str(dtype)] += MICRO_BATCHES * (ACTIVATION_ROWS + MASKED) * columns * dtype.itemsize
    places = MICRO_BATCHES * 8 * (MASKED + TOKENS)
    assert crossed["down"] == expected
    assert crossed["up"] == expected | {"torch.int64": places + MICRO_BATCHES * 8 * SEQUENCES}
    # Codes are pinned where threads have put them: here the host copies none of them.
    assert crossed["pinned"] == places
    assert told(1, "bf16", codec)["forwards"] == [] == told(1, "bf16", codec)["backwards"]


@pytest.mark.parametrize("mutation", ["timers", "item", "pageable", "lengths"])
def test_a_wait_is_noticed(told: Told, mutation: str) -> None:
    assert len(told(1, "bf16", mutation=mutation)["forwards"]) >= MICRO_BATCHES


def test_a_copy_up_that_waits_behind_one_down_is_noticed(told: Told) -> None:
    assert told(1, "bf16", mutation="one stream")["idle"] > 6 * COPY


@pytest.mark.parametrize("mutation", ["", "slow host"])
def test_what_the_device_is_said_to_have_worked_is_what_it_has(told: Told, mutation: str) -> None:
    """Also where it waits three quarters of the time for the host to launch."""
    row = told(1, "bf16", mutation=mutation)
    # Sampled is a backward that adds to the window's gradient; the first, one of four here, copies.
    assert row["told"] == pytest.approx(row["worked"], rel=0.03)
