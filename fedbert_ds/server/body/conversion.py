"""A saved body on another number of ranks or at another ZeRO stage: each rank takes its share.

Ranks and stages differ only in where a parameter's elements lie. Stage 0 keeps each parameter
whole. Stages 1 and 2 lay the parameters of an optimizer group end to end and cut that among the
ranks; stage 3 cuts every parameter by itself and lays the cuts end to end (Rajbhandari et al. 2020,
"ZeRO"). So one table of fragments reads any checkpoint, and another fills any engine: the same
numbers in other places, bit by bit. DeepSpeed then loads them as it does its own.
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

MASTERS = ""
"""Stands for the fp32 weights among the names of an optimizer's moments."""

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


@dataclass
class Share:
    """What one rank holds: fp32 tensors, and for each the optimizer's moments, flat."""

    table: Table
    masters: Sequence[Tensor]
    moments: Mapping[int, Mapping[str, Any]]
    """By tensor and name; empty before the first step, and of plain SGD. What has no dimensions,
    such as the count of steps, is the same everywhere."""

    def flat(self, tensor: int, what: str) -> Tensor:
        """The weights (MASTERS) or moments `what` of a tensor, one-dimensional."""
        whole = self.masters[tensor] if what == MASTERS else self.moments[tensor][what]
        return whole.detach().reshape(-1)


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
    first = next(iter(saved[0].moments.values()), {})
    moments = [key for key, value in first.items() if _is_partitioned(value)]
    numbers = {key: value for key, value in first.items() if not _is_partitioned(value)}
    share = Share(
        table,
        [torch.zeros(tensor.shape) for tensor in like],
        # Numbers are copied: an optimizer counts the steps of each tensor in place.
        {
            n: copy.deepcopy(numbers) | {key: torch.zeros(tensor.shape) for key in moments}
            for n, tensor in enumerate(like)
            if first
        },
    )
    for name, shape in shapes.items():
        for what in (MASTERS, *moments) if table.get(name) else ():
            values = whole(saved, name, math.prod(shape), what)
            for part in table[name]:
                flat = share.flat(part.tensor, what)
                flat[part.offset : part.offset + part.length] = values[part.start : part.start + part.length]
    return share


def _is_partitioned(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def take_over(engine: Any, stage: int, shapes: Shapes, saved: Sequence[Share]) -> None:
    """Load what is saved into a DeepSpeed engine of this ZeRO stage. All ranks call it."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    optimizer = engine.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    state = optimizer.state_dict()
    if stage == 3:
        like = state["fp32_flat_groups"]
        table = parameter_table(shapes, [flat.numel() for flat in like], rank, ranks)
    elif stage > 0:
        like = optimizer.single_partition_of_fp32_groups
        mappings: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(mappings, state["param_slice_mappings"])
        table = group_tables(mappings)[rank]
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
    if stage == 3:
        optimizer.checkpoint_event_epilogue()


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
