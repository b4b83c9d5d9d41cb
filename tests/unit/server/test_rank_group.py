"""Ranks among themselves: objects by rank, rank 0's word, barriers; here one rank, real gloo."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from fedbert_ds.server.rank_group import RankGroup


@pytest.fixture
def alone() -> Iterator[RankGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield RankGroup()
    dist.destroy_process_group()


def test_one_rank_is_a_group(alone: RankGroup) -> None:
    assert (alone.rank, alone.world_size) == (0, 1)
    assert alone.gather({"ada": 1}) == [{"ada": 1}]
    assert alone.broadcast(("tokenizer", None)) == ("tokenizer", None)
    alone.barrier()
    assert alone.group is not alone.update_group, "a thread beside the body has a group of its own"
