"""Ranks among themselves: values by rank, rank 0's word, barriers; real gloo, and strangers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from fedbert_ds.errors import ConfigError, WireError
from fedbert_ds.server import rank_group
from fedbert_ds.server.rank_group import FIRST_BYTES, RankGroup
from fedbert_ds.server.rank_messages import SECRET, RankSecret


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[RankGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield RankGroup(RankSecret(tmp_path / "run", {}))
    dist.destroy_process_group()


def test_one_rank_is_a_group(alone: RankGroup) -> None:
    assert (alone.rank, alone.world_size) == (0, 1)
    assert alone.gather({"ada": 1}, dict[str, int]) == [{"ada": 1}]
    assert alone.broadcast(("tokenizer", None), tuple[str, None]) == ("tokenizer", None)
    alone.barrier()
    assert alone.group is not alone.update_group, "a thread beside the body has a group of its own"


@pytest.mark.parametrize("size", [0, 1, FIRST_BYTES - 60, FIRST_BYTES, 5 * FIRST_BYTES])
def test_a_value_may_be_of_any_size(alone: RankGroup, size: int) -> None:
    assert alone.gather(b"x" * size, bytes) == [b"x" * size]


def test_a_value_that_would_fill_memory_is_refused(alone: RankGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_group, "MOST_BYTES", 10_000)
    with pytest.raises(WireError, match="its signature is wrong"):
        alone.gather(b"x" * 11_000, bytes)


def test_the_secret_is_gone_once_all_have_it(tmp_path: Path, alone: RankGroup) -> None:
    assert list(tmp_path.iterdir()) == []


RANK = """
import datetime, pickle, sys
import torch, torch.distributed as dist
from pathlib import Path
from fedbert_ds.errors import UserError
from fedbert_ds.server.rank_group import RankGroup
from fedbert_ds.server.rank_messages import RankSecret

rank, port, folder, secret = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
source = RankSecret(folder / "run", {"FEDBERT_RANK_SECRET": secret} if secret else {})
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=60))
"""
HONEST = (
    RANK
    + """
try:
    group = RankGroup(source)
    print(group.gather({rank: "é" * 3000 * rank}, dict[int, str])[1][1][:2], flush=True)
    print(group.broadcast(frozenset({3}) if rank == 0 else None, frozenset[int]), flush=True)
    print(group.gather(float("nan") if rank else 0.1 + 0.2, float), flush=True)
except UserError as error:
    print(error, flush=True)
"""
)
IMPOSTOR = (
    RANK
    + """
class Evil:
    def __reduce__(self):
        return (Path.touch, (folder / "owned",))

group = dist.new_group(backend="gloo")
dist.new_group(backend="gloo")
dist.barrier(group=group)
message = pickle.dumps(Evil())
sent = torch.zeros(4096, dtype=torch.uint8)
data = len(message).to_bytes(8, "big") + message
sent[:len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
dist.all_gather([torch.empty_like(sent) for _ in range(2)], sent, group=group)
"""
)


def outputs(folder: Path, programs: tuple[str, str], secrets: tuple[str, str] = ("", "")) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), str(rank), str(port), str(folder), secret],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank, (program, secret) in enumerate(zip(programs, secrets, strict=True))
    ]
    return [rank.communicate(timeout=100)[0] for rank in ranks]


@pytest.mark.parametrize("given", ["", "from the launcher"])
def test_two_ranks_tell_each_other_what_they_know(tmp_path: Path, given: str) -> None:
    expected = "éé\nfrozenset({3})\n[0.30000000000000004, nan]\n"
    assert outputs(tmp_path, (HONEST, HONEST), (given, given)) == [expected, expected]
    assert list(tmp_path.iterdir()) == []


def test_a_stranger_in_a_rank_s_place_runs_nothing_and_is_named(tmp_path: Path) -> None:
    """Before, ranks unpickled what came: code of whoever had reached the port first."""
    told = outputs(tmp_path, (HONEST, IMPOSTOR))[0]
    assert told.startswith("what came as rank 1's is not of a rank of this run: its signature is wrong")
    assert told.count("\n") == 1 and not (tmp_path / "owned").exists()


def test_ranks_with_other_secrets_refuse_each_other(tmp_path: Path) -> None:
    first, second = outputs(tmp_path, (HONEST, HONEST), ("one", "another"))
    assert "what came as rank 1's is not of a rank of this run" in first and SECRET in first
    assert "what came as rank 0's is not of a rank of this run" in second


def test_a_node_that_does_not_share_the_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"run\.rank-secret: not on this node .*; put run\.directory on a file system"
    ):
        RankSecret(tmp_path / "run", {}).read()
