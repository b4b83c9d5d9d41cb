"""torch.distributed and DeepSpeed set up in a process of its own, started without a launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]

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


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it without what a launcher sets."""
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_without_a_launcher_there_is_one_rank() -> None:
    result = run(PROGRAM)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split()[-2:] == ["gloo", "127.0.0.1"]


PATIENT = """
import sys, torch
from pathlib import Path
from deepspeed.utils import groups
from fedbert_ds.run_file import parse_config
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import split
from fedbert_ds.server.body.distributed import PATIENCE, initialize, shut_down
from fedbert_ds.server.body.engine import BodyEngine
from fedbert_ds.server.rank_group import RankGroup
from fedbert_ds.server.rank_messages import RankSecret

initialize()
model = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
config = parse_config({"model": model, "body": {"deepspeed": sys.argv[1]}}, "test")
_, body = split(build_model(config.model, 20, 0, 1), "embeddings")
BodyEngine.build(body, config.body, config.optimizer, config.kernels, torch.device("cpu"))
ours = RankGroup(RankSecret(Path(sys.argv[2])))
its_own = groups._get_data_parallel_group()
assert its_own is not torch.distributed.group.WORLD, "there is nothing to mend any more"
for group in (its_own, torch.distributed.group.WORLD, ours.group, ours.update_group):
    assert group._get_backend(torch.device("cpu")).options._timeout == PATIENCE, group
shut_down()
"""


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_no_collective_is_less_patient_than_a_run(stage: int, tmp_path: Path) -> None:
    """DeepSpeed reduces gradients in a group of its own, whose patience was torch's 30 minutes."""
    result = run(PATIENT, str(ROOT / "configs" / "deepspeed" / f"zero{stage}.json"), str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr[-2000:]
