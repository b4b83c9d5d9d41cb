"""torch.distributed and DeepSpeed set up in a process of its own, started without a launcher."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
from fedbert_ds.server.body.distributed import initialize, shut_down
initialize()
import os, torch
assert torch.distributed.get_world_size() == 1 and torch.distributed.get_rank() == 0
assert torch.get_num_threads() == 3, "OMP_NUM_THREADS"
print(torch.distributed.get_backend(), os.environ["MASTER_ADDR"])
shut_down()
assert not torch.distributed.is_initialized()
"""


def test_without_a_launcher_there_is_one_rank() -> None:
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split()[-2:] == ["gloo", "127.0.0.1"]
