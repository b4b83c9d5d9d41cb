"""Seeds depend on their purpose alone, in every process and on every machine."""

from __future__ import annotations

import os
import subprocess
import sys

from fedbert_ds.seeding import stable_seed


def test_the_same_parts_give_the_same_seed_in_every_process() -> None:
    program = "from fedbert_ds.seeding import stable_seed; print(stable_seed('body dropout', 1, 2, 3))"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert int(result.stdout) == stable_seed("body dropout", 1, 2, 3)


def test_other_parts_give_other_seeds() -> None:
    parts = [("a", 1), ("a", 2), ("b", 1), ("a", 1, 1), ("a", 11), ("a1", 1), ("a", "1", "")]
    assert len({stable_seed(*each) for each in parts}) == len(parts)


def test_torch_takes_it() -> None:
    import torch

    torch.manual_seed(stable_seed("client dropout", 0, "ada", 3, 17))
