"""ZeRO stage 3's padding set to zero, so that LAMB's norms are those of the weights alone."""

from __future__ import annotations

from typing import Any

import torch

from fedbert_ds.server.body.conversion import Shapes, parameter_table


def clear_padding(optimizer: Any, shapes: Shapes, rank: int, ranks: int) -> None:
    """Set the padding of a DeepSpeed optimizer at stage 3 to zero, in its weights and their fp32
    copies. `shapes` are in the order of its groups.

    DeepSpeed pads the last ranks' parts of a parameter that the ranks do not divide evenly, and
    leaves in them what memory held. Gradients have zeros there, so they stay as they are.
    """
    full = optimizer.fp32_partitioned_groups_flat
    if any(flat is None or not flat.numel() for flat in full):
        return  # on a disk, with DeepSpeed's NVMe offloading
    table = parameter_table(shapes, [flat.numel() for flat in full], rank, ranks)
    for tensors in (full, optimizer.fp16_partitioned_groups_flat):
        for number, flat in enumerate(tensors):
            is_padding = torch.ones(flat.numel(), dtype=torch.bool, device=flat.device)
            for parts in table.values():
                for part in parts:
                    if part.tensor == number:
                        is_padding[part.offset : part.offset + part.length] = False
            flat.data[is_padding] = 0.0
