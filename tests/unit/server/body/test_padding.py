"""Padding becomes zero, weights stay."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fedbert_ds.server.body.padding import clear_padding

SHAPES = {"a": (7,), "b": (2,), "c": (3,)}


@pytest.mark.parametrize(("rank", "kept"), [(0, [1, 1, 1, 1]), (1, [1, 1, 1, 1]), (2, [1, 0, 0, 0])])
def test_only_padding_becomes_zero(rank: int, kept: list[int]) -> None:
    """Of 7 and 2 elements in one tensor, and 3 in another: parts of 3, 1 and 1 of three ranks."""
    optimizer = SimpleNamespace(
        fp32_partitioned_groups_flat=[torch.ones(4), torch.ones(1)],
        fp16_partitioned_groups_flat=[torch.ones(4).bfloat16(), torch.ones(1).bfloat16()],
    )
    clear_padding(optimizer, SHAPES, rank, ranks=3)
    for flats in (optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat):
        assert [flat.tolist() for flat in flats] == [kept, [1]]


def test_tensors_on_a_disk_are_left_alone() -> None:
    clear_padding(SimpleNamespace(fp32_partitioned_groups_flat=[None]), SHAPES, rank=0, ranks=3)
