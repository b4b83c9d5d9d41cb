"""Memory of a micro-batch in flight, seen or counted, and the memory available for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from fedbert_ds.config import Cut, Kernels
from fedbert_ds.model.body import Recomputed
from fedbert_ds.model.cut import body_skeleton
from fedbert_ds.server.body.links import ranks_on_node
from fedbert_kernels.recompute import watching

SHARE = 0.5
"""Share of the memory that is free when the body is built. Optimizer states and network buffers
need the rest."""


@dataclass
class Saved:
    """Storages that a graph keeps for its backward: bytes by identity."""

    storages: dict[int, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all storages, each counted once."""
        return sum(self.storages.values())


@contextmanager
def saved_bytes(parameters: Iterable[Tensor]) -> Iterator[Saved]:
    """Count what graphs built inside this block keep. Parameters do not count."""
    saved = Saved()
    known = {parameter.untyped_storage()._cdata for parameter in parameters}

    def count(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved.storages[storage._cdata] = storage.nbytes()

    def pack(tensor: Tensor) -> Tensor:
        count(tensor)
        return tensor

    with watching(count), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def bytes_kept(
    hf_config: Any,
    cut: Cut,
    kernels: Kernels,
    recomputed: Recomputed,
    dtype: torch.dtype,
    lengths: Sequence[int],
    masked: int,
    rows: int | None = None,
) -> int:
    """What a forward on a GPU keeps until its backward, counted without a GPU.

    The body's own forward runs on the meta device, where tensors have sizes and no values. `masked`
    positions are wanted; with the cut `rows`, activations are of so many `rows`. `auto` kernels
    count as fused. Attention counts as one that keeps no scores, as torch's does on a GPU as well,
    where a head's size allows. Torch's dropout masks count in the body's dtype, as on a CPU; a GPU
    has them in a byte.
    """
    # Imported here, as `install_kernels` does: Triton takes a second.
    from fedbert_kernels.attention import HEAD_SIZES, attention
    from fedbert_kernels.patch_modules import patch_modules

    meta = torch.device("meta")
    body = body_skeleton(hf_config, cut).to(meta, dtype).train()
    body.recompute(recomputed)
    if kernels != "torch":
        patch_modules(body, "triton", dtype, recompute=body.recomputes_elementwise)
    fits = hf_config.hidden_size // hf_config.num_attention_heads in HEAD_SIZES
    body.attend = attention if fits else None
    num_tokens = sum(lengths)
    shape = (rows or num_tokens, body.widths.activations)
    activations = torch.empty(shape, dtype=body.input_dtype, device=meta, requires_grad=True)
    positions = torch.empty(masked, dtype=torch.int64, device=meta)
    row_index = torch.empty(num_tokens, dtype=torch.int64, device=meta) if rows else None
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    with saved_bytes(body.parameters()) as saved:
        body(activations, positions, bounds, row_index)
    return saved.num_bytes


def memory_budget(device: torch.device) -> int:
    """Bytes for micro-batches in flight on this rank: a share of the memory that is free now."""
    if device.type != "cpu":
        free, _ = torch.get_device_module(device).mem_get_info(device)
        return int(SHARE * free)
    return int(SHARE * psutil.virtual_memory().available) // ranks_on_node(os.environ)
