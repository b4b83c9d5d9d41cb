"""A saved body on another number of ranks or at another ZeRO stage: each rank takes its share.

Ranks and stages differ only in where a parameter's elements lie (layout.py). So one table of
fragments reads any checkpoint, and another fills any engine: the same numbers in other places, bit
by bit. DeepSpeed then loads them as it does its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from fedbert_ds.errors import RunError
from fedbert_ds.server.body.layout import Shapes, Table, group_tables, parameter_table, tables_of, whole_table

MASTERS = ""
"""Stands for the fp32 weights among the names of an optimizer's moments."""


@dataclass
class Share:
    """What one rank holds: fp32 tensors, and for each the optimizer's moments, flat."""

    table: Table
    masters: Sequence[Tensor]
    moments: Mapping[int, Mapping[str, Any]]
    """By tensor and name; empty before the first step, and of plain SGD. What has no dimensions is
    a count of steps."""

    def flat(self, tensor: int, what: str) -> Tensor:
        """The weights (MASTERS) or moments `what` of a tensor, one-dimensional."""
        whole = self.masters[tensor] if what == MASTERS else self.moments[tensor][what]
        return whole.detach().reshape(-1)


def read_shares(folder: Path, shapes: Shapes, ranks: int, stage: int) -> list[Share]:
    """What each rank wrote into a checkpoint's folder; RunError if that cannot be read.

    The tensors stay on disk until they are used.
    """
    try:
        if stage == 0:
            return [_read_whole(folder, shapes)]
        states = [_load(folder, f"*zero_pp_rank_{n}_mp_rank_00_optim_states.pt") for n in range(ranks)]
        optimizers = [state["optimizer_state_dict"] for state in states]
        if stage == 3:
            return [
                Share(
                    parameter_table(shapes, [flat.numel() for flat in state["fp32_flat_groups"]], rank, ranks),
                    state["fp32_flat_groups"],
                    state["optimizer_state_dict"]["state"],
                )
                for rank, state in enumerate(optimizers)
            ]
        tables = group_tables([state["param_slice_mappings"] for state in optimizers])
        return [
            Share(table, state["single_partition_of_fp32_groups"], state["base_optimizer_state"]["state"])
            for table, state in zip(tables, optimizers, strict=True)
        ]
    except (OSError, RuntimeError, ValueError, KeyError, IndexError, TypeError, EOFError) as error:
        raise RunError(
            f"{folder}: cannot be read as saved by {ranks} ranks at ZeRO stage {stage} ({error!r}); remove this folder "
            "to resume from the window before, or start anew in another run.directory"
        ) from error


def check_groups(folder: Path, stage: int, groups: int) -> None:
    """RunError if the optimizer in a checkpoint's folder has another number of parameter groups:
    their tensors would be taken for others. A folder without that is for others to refuse.
    """
    files = "mp_rank_00_model_states.pt" if stage == 0 else "*zero_pp_rank_0_mp_rank_00_optim_states.pt"
    if not any(folder.glob(files)):
        return
    try:
        state = _load(folder, files)["optimizer" if stage == 0 else "optimizer_state_dict"]
        inner = state.get("base_optimizer_state" if stage in (1, 2) else "optimizer_state_dict", state)
        found = len(inner["param_groups"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError):
        return
    if found != groups:
        raise RunError(
            f"{folder}: saved with {found} groups of parameters, where this FedBERT-DS has {groups}; resume with the "
            "version that saved it, or start anew in another run.directory"
        )


def whole(shares: Sequence[Share], name: str, size: int, what: str) -> Tensor:
    """A parameter's weights (MASTERS) or moments, [size] fp32, put together from all ranks' shares.

    Raises ValueError if they do not hold all of it.
    """
    result = torch.empty(size)
    found = 0
    for share in shares:
        for part in share.table.get(name, ()):
            flat = share.flat(part.tensor, what)
            result[part.start : part.start + part.length] = flat[part.offset : part.offset + part.length]
            found += part.length
    if found != size:
        raise ValueError(f"{name} has {size} elements, the checkpoint {found}")
    return result


def fill(table: Table, like: Sequence[Tensor], saved: Sequence[Share], shapes: Shapes) -> Share:
    """A rank's share of what is saved, in tensors of these shapes, on the CPU; padding is 0."""
    share = Share(table, [torch.zeros(tensor.shape) for tensor in like], moments := {})
    for name, shape in shapes.items():
        state = _state(saved, name)
        partitioned = [key for key, value in state.items() if _is_partitioned(value)]
        for part in table.get(name, ()):
            if state and part.tensor not in moments:
                # Numbers are copied: an optimizer counts the steps of each tensor in place.
                numbers = {key: copy.deepcopy(value) for key, value in state.items() if key not in partitioned}
                moments[part.tensor] = numbers | {key: torch.zeros(like[part.tensor].shape) for key in partitioned}
        for what in (MASTERS, *partitioned) if table.get(name) else ():
            values = whole(saved, name, math.prod(shape), what)
            for part in table[name]:
                flat = share.flat(part.tensor, what)
                flat[part.offset : part.offset + part.length] = values[part.start : part.start + part.length]
    return share


def _state(saved: Sequence[Share], name: str) -> Mapping[str, Any]:
    """What the optimizer remembers of a tensor in which the parameter lies."""
    parts = ((share, part) for share in saved for part in share.table.get(name, ()))
    return next((share.moments.get(part.tensor, {}) for share, part in parts), {})


def _is_partitioned(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def take_over(engine: Any, stage: int, shapes: Shapes, saved: Sequence[Share]) -> None:
    """Load what is saved into a DeepSpeed engine of this ZeRO stage. All ranks call it."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    optimizer = engine.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    state = optimizer.state_dict()
    if stage > 0:
        like = state["fp32_flat_groups"] if stage == 3 else optimizer.single_partition_of_fp32_groups
        table = tables_of(optimizer, stage, shapes)[rank]
    else:
        like = [torch.empty(shape, device="meta") for shape in shapes.values()]
        table = whole_table(shapes)
    share = fill(table, like, saved, shapes)
    if stage < 3:
        # DeepSpeed rounds the weights of stage 3 itself; below, a checkpoint has them beside.
        for name, parameter in engine.module.named_parameters():
            if name in shapes:
                parameter.data.copy_(whole(saved, name, parameter.numel(), MASTERS).view(parameter.shape))
    if stage == 0:
        _load_whole(optimizer, state, share)
        return
    key = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    state[key] = {"state": share.moments, "param_groups": state[key]["param_groups"]}
    state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] = share.masters
    # One entry for each rank, of which DeepSpeed takes this rank's.
    optimizer.load_state_dict([state] * ranks, load_optimizer_states=True, load_from_fp32_weights=True)


def _load_whole(optimizer: Any, state: dict[str, Any], share: Share) -> None:
    if "fp32_groups" not in state:
        optimizer.load_state_dict(state | {"state": share.moments})
        return
    masters = iter(share.masters)
    groups = [[next(masters) for _ in group] for group in state["fp32_groups"]]
    inner = state["optimizer_state_dict"] | {"state": share.moments}
    optimizer.load_state_dict(state | {"fp32_groups": groups, "optimizer_state_dict": inner})


def _read_whole(folder: Path, shapes: Shapes) -> Share:
    state = _load(folder, "mp_rank_00_model_states.pt")
    optimizer = state["optimizer"]
    masters = [state["module"][name] for name in shapes]
    if "fp32_groups" in optimizer:  # bf16: the module has rounded weights
        masters = [master for group in optimizer["fp32_groups"] for master in group]
        optimizer = optimizer["optimizer_state_dict"]
    return Share(whole_table(shapes), masters, optimizer["state"])


def _load(folder: Path, pattern: str) -> dict[str, Any]:
    (path,) = folder.glob(pattern)
    # DeepSpeed's files hold objects of its own, and it loads them itself in this way.
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
