"""A window's gradient: summed in fp32, crossing ranks once, put where DeepSpeed's step takes it.

DeepSpeed sums in the weights' precision, hands its sums on in it, and at ZeRO stages 2 and 3 lets
ranks meet in every backward. At stage 3 it begins its sum anew in a backward before which there was
no forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.nn.functional import pad


class WindowGradient:
    """Sums gradients of a body under DeepSpeed: 4 bytes a parameter on every rank, at every stage.

    `masters` are the fp32 weights that stage 0 steps, by parameter.
    """

    def __init__(self, engine: Any, stage: int, masters: Mapping[Tensor, Tensor]) -> None:
        self._optimizer = engine.optimizer
        self._stage = stage
        self._masters = masters
        self._has_cuts = stage == 3 and torch.distributed.get_world_size(engine.optimizer.dp_process_group) > 1
        self._parameters: list[Tensor] = []
        self._sums: list[Tensor] = []
        """By parameter, in the tensors below; at stage 3, with several ranks, [ranks, elements of
        each]."""
        self._flats: list[Tensor] = []
        """fp32, laid out as DeepSpeed's own; one at stage 0, one for each optimizer group above."""
        for sums, flat in _sums(engine, stage):
            self._flats.append(flat)
            self._parameters.extend(sums)
            self._sums.extend(sums.values())

    def backward(self, outputs: Tensor, gradient: Tensor, inputs: Tensor, adds_up: bool = True) -> Tensor:
        """d/d(inputs), where `gradient` is d/d(outputs); the parameters' gradients are added up, or
        are not.
        """
        of_inputs, *of_parameters = torch.autograd.grad(
            outputs, [inputs, *self._parameters], gradient.to(outputs.dtype), allow_unused=True
        )
        assert of_inputs is not None
        if adds_up:
            used = [(total, one) for total, one in zip(self._sums, of_parameters, strict=True) if one is not None]
            if self._has_cuts:
                used = [(total, _cut(one, total.shape)) for total, one in used]
            torch._foreach_add_([total for total, _ in used], [one for _, one in used])
        return of_inputs

    def give(self) -> None:
        """Let DeepSpeed's optimizer step by the sums over all ranks, which all call it. `drop` them
        after the step.
        """
        if self._stage == 0:
            for flat in self._flats:
                torch.distributed.all_reduce(flat)
            for parameter, total in zip(self._parameters, self._sums, strict=True):
                self._masters[parameter].grad = total
            return
        group = self._optimizer.dp_process_group
        ranks = torch.distributed.get_world_size(group)
        for number, flat in enumerate(self._flats):
            part = flat.new_empty(len(flat) // ranks)
            torch.distributed.reduce_scatter_tensor(part, flat, group=group)
            if self._stage == 3:
                self._give_cuts(number, part)
            else:
                self._give_part(number, part)

    @property
    def is_finite(self) -> bool:
        """Whether this rank's sums are. Waits for the device, once."""
        return bool(torch.stack([torch.isfinite(flat).all() for flat in self._flats]).all())

    def drop(self) -> None:
        """Forget the sums."""
        torch._foreach_zero_(self._flats)

    def _give_part(self, number: int, part: Tensor) -> None:
        """This rank's part of the gradient of an optimizer group."""
        optimizer = self._optimizer
        if not optimizer.cpu_offload:
            optimizer.averaged_gradients[number] = [part]
            return
        optimizer.single_partition_of_fp32_groups[number].grad.copy_(part)
        # DeepSpeed adds up the norms of what parameters have in the part: here the first has all.
        norms = itertools.chain([torch.linalg.vector_norm(part)], itertools.repeat(part.new_zeros(())))
        for parameter, norm in zip(optimizer.params_in_partition[number], norms, strict=False):
            optimizer.norm_for_param_grads[optimizer.get_param_id(parameter)] = norm

    def _give_cuts(self, number: int, cuts: Tensor) -> None:
        """This rank's cuts of the gradients of an optimizer group, at stage 3."""
        optimizer = self._optimizer
        if not optimizer.offload_optimizer:
            optimizer.averaged_gradients[number] = [cuts]
            return
        # DeepSpeed copies to the host, or collects here what it writes to a disk.
        written: tuple[dict[int, list[Tensor]], dict[int, list[int]]] = {}, {}
        group = optimizer.fp16_groups[number]
        for parameter, cut in zip(group, cuts.split([p.partition_numel() for p in group]), strict=True):
            optimizer._offload_grad_partition_at_boundary(parameter, cut, *written)
        optimizer._swap_out_offload_fp32_gradients(*written)


def _sums(engine: Any, stage: int) -> Iterator[tuple[dict[Tensor, Tensor], Tensor]]:
    """Zeros for each parameter, views of a flat tensor, and that tensor."""
    optimizer = engine.optimizer
    if stage == 0:
        places, length = {}, 0
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                places[parameter] = length
                length += parameter.numel()
        flat = _zeros(length, places)
        yield _views(flat, places), flat
    elif stage < 3:
        for parameters, weights in zip(optimizer.round_robin_bit16_groups, optimizer.bit16_groups_flat, strict=True):
            flat = _zeros(weights.numel(), parameters)
            # Parameters are views of the weights.
            yield _views(flat, {p: p.storage_offset() - weights.storage_offset() for p in parameters}), flat
    else:
        ranks = torch.distributed.get_world_size(optimizer.dp_process_group)
        for parameters in optimizer.fp16_groups:
            cuts = [parameter.partition_numel() for parameter in parameters]
            flat = _zeros(ranks * sum(cuts), parameters)
            # A rank's cuts of all parameters lie end to end.
            sums = dict(zip(parameters, flat.view(ranks, -1).split(cuts, dim=1), strict=True))
            if ranks == 1:
                sums = {one: place.view(one.ds_shape) for one, place in sums.items()}
            yield sums, flat


def _zeros(length: int, parameters: Iterable[Tensor]) -> Tensor:
    return torch.zeros(length, dtype=torch.float32, device=next(iter(parameters)).device)


def _views(flat: Tensor, places: Mapping[Tensor, int]) -> dict[Tensor, Tensor]:
    return {one: flat[offset : offset + one.numel()].view(one.shape) for one, offset in places.items()}


def _cut(gradient: Tensor, shape: torch.Size) -> Tensor:
    """[ranks, elements of each rank]: DeepSpeed fills the last ranks' cuts up."""
    if gradient.numel() == shape.numel():
        return gradient.reshape(shape)
    return pad(gradient.reshape(-1), (0, shape.numel() - gradient.numel())).view(shape)
