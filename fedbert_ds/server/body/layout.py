"""Where ranks keep the elements of a body's parameters, at each ZeRO stage.

Stage 0 keeps each parameter whole. Stages 1 and 2 lay the parameters of an optimizer group end to
end and cut that among the ranks; stage 3 cuts every parameter by itself and lays the cuts end to
end (Rajbhandari et al. 2020, "ZeRO").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from fedbert_ds.errors import ConfigError
from fedbert_ds.model.partition import Partition, Slice

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each parameter by Hugging Face name, in the order of the optimizer's groups."""


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a parameter, and where one rank keeps them."""

    start: int
    """First element, of the flattened parameter."""
    tensor: int
    """Number of the rank's tensor that holds them."""
    offset: int
    """Where they begin there."""
    length: int


Table = Mapping[str, Sequence[Fragment]]
"""One rank's fragments, by parameter."""


def whole_table(shapes: Shapes) -> Table:
    """Stage 0: every rank has every parameter whole, in a tensor of its own."""
    return {name: [Fragment(0, n, 0, math.prod(shape))] for n, (name, shape) in enumerate(shapes.items())}


def group_tables(mappings: Sequence[Sequence[Mapping[str, Any]]]) -> list[Table]:
    """Stages 1 and 2, by rank, from DeepSpeed's `param_slice_mappings` of all ranks: for each
    group, where the rank's part of each parameter lies in it.
    """
    taken: dict[str, int] = {}
    tables: list[Table] = []
    for groups in mappings:
        table: dict[str, list[Fragment]] = {}
        for tensor, group in enumerate(groups):
            for name, address in group.items():
                # Parts are cut off in the order of ranks.
                start = taken.get(name, 0)
                table.setdefault(name, []).append(Fragment(start, tensor, address.start, address.numel))
                taken[name] = start + address.numel
        tables.append(table)
    return tables


def parameter_table(shapes: Shapes, sizes: Sequence[int], rank: int, ranks: int) -> Table:
    """Stage 3: a rank's tensors, of these sizes, are filled one parameter's part after another."""
    table: dict[str, list[Fragment]] = {}
    tensor = offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        part = math.ceil(size / ranks)
        while offset == sizes[tensor]:
            tensor, offset = tensor + 1, 0
        # The last parts may be shorter, or nothing; DeepSpeed pads them.
        length = min(part, size - rank * part)
        table[name] = [Fragment(rank * part, tensor, offset, length)] if length > 0 else []
        offset += part
    return table


def tables_of(optimizer: Any, stage: int, shapes: Shapes) -> list[Table]:
    """All ranks' tables of a DeepSpeed optimizer above stage 0. All ranks call it."""
    ranks = torch.distributed.get_world_size()
    if stage == 3:
        sizes = optimizer.fp16_partitioned_groups_flat_numel
        return [parameter_table(shapes, sizes, rank, ranks) for rank in range(ranks)]
    mappings: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(mappings, optimizer.state_dict()["param_slice_mappings"])
    return group_tables(mappings)


def partitions_of(optimizer: Any, stage: int, shapes: Shapes, device: torch.device) -> dict[Tensor, Partition]:
    """How each flat tensor of fp32 weights that a DeepSpeed optimizer steps is made up, above stage
    0. All ranks call it.

    Raises ConfigError if the tensors are on a disk.
    """
    flats = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    if any(flat is None for flat in flats):
        raise ConfigError(
            "body.deepspeed: optimizers that work on whole parameters, lamb and muon, cannot step what is offloaded "
            "to a disk; offload to the CPU or choose optimizer.name adamw"
        )
    tables = tables_of(optimizer, stage, shapes)
    return {
        flat: partition(tables, tensor, shapes, torch.distributed.get_rank(), device)
        for tensor, flat in enumerate(flats)
    }


def partition(tables: Sequence[Table], tensor: int, shapes: Shapes, rank: int, device: torch.device) -> Partition:
    """The ranks' tensors of this number."""
    names = [name for name in shapes if any(part.tensor == tensor for table in tables for part in table.get(name, ()))]
    slices = [
        [
            Slice(number, part.start, part.offset, part.length)
            for number, name in enumerate(names)
            for part in table.get(name, ())
            if part.tensor == tensor
        ]
        for table in tables
    ]
    return Partition([shapes[name] for name in names], slices, rank, device)
