"""ZeRO stage 3: layers' matrices are whole on every rank while they are needed, and no longer.

DeepSpeed divides weights among the ranks, and would gather them by hooks of every module, parameter
by parameter: the host then needs several times as long as for the layers. Its hooks also count a
module's forwards, which several micro-batches in flight upset. Here one collective gathers a few
layers, and that of the next begins before these compute. Released weights keep their storage
without bytes, so that graphs in flight, whose views of weights share it, find them again in
backward (PyTorch's FSDP does the same: Zhao et al. 2023, "PyTorch FSDP").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from fedbert_ds.model.body import Body


class LayerWeights:
    """Gathers and releases the weights of a body's layers, in place of DeepSpeed's hooks.

    `engine` is DeepSpeed's, at stage 3; its `stage3_prefetch_bucket_size` says how many parameters
    are gathered together, in whole layers, one at least. All ranks compute the same sequence of
    forwards and backwards, each inside `forward` or `backward`, and each gathers every layer once.
    What is little, vectors and all outside of layers, stays whole.
    """

    def __init__(self, engine: Any, body: Body) -> None:
        _take_off_hooks(engine, body)
        group = engine.optimizer.dp_process_group
        layers = [layer for layer in body.layers if next(layer.parameters(), None) is not None]
        matrices = [[one for one in layer.parameters() if len(one.ds_shape) > 1] for layer in layers]
        sizes = [sum(one.ds_numel for one in of_layer) for of_layer in matrices]
        self._units: list[_Weights] = []
        """Of layers that follow each other."""
        for unit, span in enumerate(spans(sizes, engine.zero_prefetch_bucket_size())):
            self._units.append(_Weights([one for of_layer in matrices[span] for one in of_layer], group))
            layers[span][0].register_forward_pre_hook(partial(self._before_forward, unit))
            layers[span][-1].register_forward_hook(partial(self._after_forward, unit))
        divided = {one for of_layer in matrices for one in of_layer}
        self._others = _Weights([one for one in body.parameters() if one not in divided], group)
        self._is_backward = False
        self.renew()

    def renew(self) -> None:
        """Take over what a step or a checkpoint has made of the weights; all ranks together."""
        self._others.release()
        self._others.begin()
        self._others.hold()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, parameters have no entries, as DeepSpeed's checkpoints expect."""
        try:
            for weights in (*self._units, self._others):
                weights.detach()
            yield
        finally:
            for weights in (*self._units, self._others):
                weights.attach()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Inside, layers find their weights; afterwards none is whole."""
        try:
            self._units[0].begin()
            yield
        finally:
            self._release()

    @contextmanager
    def backward(self) -> Iterator[None]:
        """As `forward`, for the graph of a forward before."""
        self._is_backward = True
        try:
            self._units[-1].begin()
            yield
        finally:
            self._is_backward = False
            self._release()

    def _before_forward(self, unit: int, layer: nn.Module, inputs: Any) -> None:
        # What a checkpoint computes again in backward finds them whole.
        if not self._is_backward:
            self._hold(unit, unit + 1)

    def _after_forward(self, unit: int, layer: nn.Module, inputs: Any, output: Any) -> None:
        if self._is_backward:
            return
        self._units[unit].release()
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(partial(self._before_backward, unit))

    def _before_backward(self, unit: int, gradient: Tensor) -> None:
        # By then autograd has done with the layers behind: what was computed later goes first.
        if unit + 1 < len(self._units):
            self._units[unit + 1].release()
        self._hold(unit, unit - 1)

    def _hold(self, unit: int, following: int) -> None:
        self._units[unit].begin()
        if 0 <= following < len(self._units):
            self._units[following].begin()
        self._units[unit].hold()

    def _release(self) -> None:
        for weights in self._units:
            weights.release()


def spans(sizes: Sequence[int], most: int) -> list[slice]:
    """Neighbours that sum to at most `most`, or single ones."""
    found: list[slice] = []
    start = total = 0
    for place, size in enumerate(sizes):
        if place > start and total + size > most:
            found.append(slice(start, place))
            start, total = place, 0
        total += size
    return [*found, slice(start, len(sizes))]


class _Weights:
    """Parameters that are gathered together, views of one tensor."""

    def __init__(self, parameters: Sequence[Any], group: Any) -> None:
        self._parameters = parameters
        self._group = group
        self._ranks = torch.distributed.get_world_size(group)
        self._device = parameters[0].device
        # DeepSpeed fills the last ranks' cuts up.
        self._sizes = [parameter.partition_numel() for parameter in parameters]
        whole = torch.empty(self._ranks * sum(self._sizes), dtype=parameters[0].dtype, device=self._device)
        places = whole.split([self._ranks * size for size in self._sizes])
        self._views = [
            place[: parameter.ds_numel].view(parameter.ds_shape)
            for parameter, place in zip(parameters, places, strict=True)
        ]
        self._places = [place.view(self._ranks, -1) for place in places]
        self._storage, self._bytes = whole.untyped_storage(), whole.nbytes
        self._coming: tuple[Tensor, Any] | None = None
        """[ranks x elements of each], and the work that brings it; a rank alone has it."""
        self.attach()
        self.release()

    def attach(self) -> None:
        """Let the parameters be views."""
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.data = view

    def detach(self) -> None:
        """Let them be nothing."""
        for parameter in self._parameters:
            parameter.data = parameter.data.new_empty(0)

    def begin(self) -> None:
        """Begin to gather, unless they are whole or under way."""
        if self._coming is not None or self._storage.nbytes():
            return
        cuts = [parameter.ds_tensor for parameter in self._parameters]
        if cuts[0].device != self._device:
            cuts = [cut.to(self._device, non_blocking=True) for cut in cuts]
        mine = torch.cat(cuts)
        if self._ranks == 1:
            self._coming = mine, None
            return
        coming = mine.new_empty(self._ranks * len(mine))
        self._coming = coming, torch.distributed.all_gather_into_tensor(coming, mine, self._group, async_op=True)

    def hold(self) -> None:
        """Let the parameters be whole, once what `begin` began is done."""
        if self._coming is None:
            return
        by_rank = self._arrived().view(self._ranks, -1)
        self._storage.resize_(self._bytes)
        torch.split_with_sizes_copy(by_rank, self._sizes, dim=1, out=self._places)

    def release(self) -> None:
        """Free what the parameters take, and what is under way."""
        if self._coming is not None:
            self._arrived()
        self._storage.resize_(0)

    def _arrived(self) -> Tensor:
        assert self._coming is not None
        (coming, work), self._coming = self._coming, None
        if work is not None:
            work.wait()
        return coming


def _take_off_hooks(engine: Any, body: Body) -> None:
    """Let no module gather what is divided when it is called, or when its parameters are read."""
    engine.optimizer.parameter_offload._remove_module_hooks()
    for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        hook.remove()
    for module in body.modules():
        module._parameters = module._original_parameters  # type: ignore[assignment]
