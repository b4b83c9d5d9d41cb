"""A window's gradient: summed in fp32, crossing ranks once, put where DeepSpeed's step takes it.

DeepSpeed sums in the weights' precision, hands its sums on in it, and at ZeRO stage 2 lets ranks
meet in every backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor


class WindowGradient:
    """Sums gradients of a body under DeepSpeed, at stages that keep its parameters whole.

    `masters` are the fp32 weights that stage 0 steps, by parameter.
    """

    def __init__(self, engine: Any, stage: int, masters: Mapping[Tensor, Tensor]) -> None:
        self._optimizer = engine.optimizer
        self._stage = stage
        self._masters = masters
        self._parameters: list[Tensor] = []
        self._sums: list[Tensor] = []
        """By parameter, in the tensors below."""
        self._flats: list[Tensor] = []
        """fp32, laid out as DeepSpeed's own; one at stage 0, one for each optimizer group above."""
        for places, length in _places(engine, stage):
            flat = torch.zeros(length, dtype=torch.float32, device=next(iter(places)).device)
            self._flats.append(flat)
            for parameter, offset in places.items():
                self._parameters.append(parameter)
                self._sums.append(flat[offset : offset + parameter.numel()].view(parameter.shape))

    def backward(self, outputs: Tensor, gradient: Tensor, inputs: Tensor) -> Tensor:
        """d/d(inputs), where `gradient` is d/d(outputs); the parameters' gradients are added up."""
        of_inputs, *of_parameters = torch.autograd.grad(
            outputs, [inputs, *self._parameters], gradient.to(outputs.dtype), allow_unused=True
        )
        used = [(total, one) for total, one in zip(self._sums, of_parameters, strict=True) if one is not None]
        torch._foreach_add_([total for total, _ in used], [one for _, one in used])
        assert of_inputs is not None
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


def _places(engine: Any, stage: int) -> Iterator[tuple[dict[Tensor, int], int]]:
    """Parameters and where they begin in each flat tensor of gradients, and its length."""
    if stage > 0:
        optimizer = engine.optimizer
        for parameters, flat in zip(optimizer.round_robin_bit16_groups, optimizer.bit16_groups_flat, strict=True):
            # Parameters are views of it.
            yield {p: p.storage_offset() - flat.storage_offset() for p in parameters}, flat.numel()
        return
    places, length = {}, 0
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            places[parameter] = length
            length += parameter.numel()
    yield places, length
