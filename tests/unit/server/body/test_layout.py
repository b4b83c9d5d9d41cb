"""Tables of fragments become the partitions that an optimizer works by."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fedbert_ds.errors import ConfigError
from fedbert_ds.model.partition import Slice
from fedbert_ds.server.body.layout import group_tables, parameter_table, partition, partitions_of, tables_of

CPU = torch.device("cpu")
SHAPES = {"a": (2, 3), "b": (5,), "c": (1,)}


def test_parameters_of_a_tensor_are_numbered_alike_on_all_ranks() -> None:
    """`a` lies in the first group alone, over both ranks; `b` and `c` in the second, where the
    second rank has nothing but the end of `b` and `c`.
    """
    mappings = [
        [{"a": SimpleNamespace(start=0, numel=4)}, {"b": SimpleNamespace(start=0, numel=3)}],
        [
            {"a": SimpleNamespace(start=0, numel=2)},
            {"b": SimpleNamespace(start=0, numel=2), "c": SimpleNamespace(start=2, numel=1)},
        ],
    ]
    tables = group_tables(mappings)
    first, second = (partition(tables, number, SHAPES, 1, CPU) for number in range(2))
    assert first.shapes == [(2, 3)] and first.slices == [[Slice(0, 0, 0, 4)], [Slice(0, 4, 0, 2)]]
    assert second.shapes == [(5,), (1,)]
    assert second.slices == [[Slice(0, 0, 0, 3)], [Slice(0, 3, 0, 2), Slice(1, 0, 2, 1)]]
    assert second.own == second.slices[1]


def test_stage_3_is_known_without_asking_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    flats = [torch.zeros(3), torch.zeros(4)]
    optimizer = SimpleNamespace(fp16_partitioned_groups_flat_numel=[3, 4], fp32_partitioned_groups_flat=flats)
    tables = tables_of(optimizer, 3, SHAPES)
    assert tables == [parameter_table(SHAPES, [3, 4], rank, 2) for rank in range(2)]
    found = partitions_of(optimizer, 3, SHAPES, CPU)
    assert list(found) == flats
    assert found[flats[1]].shapes == [(5,), (1,)]
    assert found[flats[1]].own == [Slice(0, 3, 0, 2)], "the one element of c is the first rank's"


def test_weights_on_a_disk_are_refused_in_one_line() -> None:
    optimizer = SimpleNamespace(fp32_partitioned_groups_flat=[None])
    with pytest.raises(
        ConfigError, match=r"cannot step what is offloaded to a disk; .* optimizer\.name adamw"
    ) as caught:
        partitions_of(optimizer, 3, SHAPES, CPU)
    assert "\n" not in str(caught.value)
