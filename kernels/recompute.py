"""Cheap results are computed again in backward, not kept until then.

Autograd keeps the inputs of a matrix product for its backward. Where such an input is the result of
`cheap`, `consume` runs the product, and both are inside `recomputing`, its recipe is kept instead:
function and arguments, which are kept for other reasons, or are such results themselves. Backward
computes each once, with the same bits. No matrix product runs again, unless it is inside of what
`again` runs: attention. A product's own result may be kept in codes of fewer bits
(`cheap_in_codes`); backward then has what they stand for.

Torch's own selective checkpointing does the same through a dispatch mode, in Python for every
operator: several times the host's time of a forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from fedbert_kernels.encoded import Encoded

_is_active: ContextVar[bool] = ContextVar("_is_active", default=False)
_codec: ContextVar[str | None] = ContextVar("_codec", default=None)
_watcher: ContextVar[Callable[[Tensor], None] | None] = ContextVar("_watcher", default=None)


def cheap(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, which must give the same bits whenever it is called."""
    result = function(*arguments)
    if not torch.compiler.is_compiling() and _is_active.get() and result.requires_grad:
        whole = result if result._base is None else result._base
        whole._recipe = _Recipe(function, arguments)  # type: ignore[attr-defined]
    return result


def cheap_in_codes(kept: Tensor, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """As `cheap`; inside `recomputing` with a codec, `kept`, one of the arguments, is kept in its
    codes, for `function` and wherever else `consume` would keep it.

    The result is exact; gradients are those at the values that the codes stand for, which
    activation-compressed training shows to suffice (Chen et al. 2021, "ActNN").
    """
    if torch.compiler.is_compiling() or (codec := _codec.get()) is None:
        return cheap(function, *arguments)
    whole = kept if kept._base is None else kept._base
    if kept.requires_grad and whole.is_contiguous():
        whole._recipe = _Codes(whole.detach(), codec)  # type: ignore[attr-defined]
    return cheap(partial(consume, function), *arguments)


def consume(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, whose graph keeps recipes in place of cheap results."""
    # A compiler that traces this cannot read a context, and chooses itself what it keeps.
    if torch.compiler.is_compiling() or not _is_active.get():
        return function(*arguments)
    watcher = _watcher.get()
    pack = _pack if watcher is None else partial(_pack_watched, watcher)
    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        return function(*arguments)


def again(function: Callable[..., Tensor], *tensors: Tensor, draws: bool = False) -> Tensor:
    """`function(*tensors)`, of which the tensors alone are kept.

    Backward calls it a second time, for its result, where `consume` took that, and for its
    gradient. `draws` says that it draws random numbers; the second call draws the same.
    """
    if not _is_active.get() or not torch.is_grad_enabled():
        return function(*tensors)
    recipe = _Again(function, tensors, draws)
    watcher = _watcher.get()
    if watcher is not None:
        for tensor in tensors:
            watcher(tensor)
    result = _RunAgain.apply(recipe, *tensors)
    whole = result if result._base is None else result._base
    whole._recipe = recipe
    return result


@contextmanager
def recomputing(codec: str | None = None) -> Iterator[None]:
    """Inside, `cheap` notes recipes and `consume` keeps them; `cheap_in_codes` uses a codec of
    `encoded.NAMES`.
    """
    tokens = _is_active.set(True), _codec.set(codec)
    try:
        yield
    finally:
        _is_active.reset(tokens[0])
        _codec.reset(tokens[1])


@contextmanager
def watching(watcher: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `watcher` with each tensor that `consume` keeps: other hooks do not see those."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


class _Recipe:
    """How to compute a result again, once."""

    __slots__ = ("_arguments", "_function", "_value")

    def __init__(self, function: Callable[..., Tensor], arguments: Sequence[Any]) -> None:
        self._function = function
        self._arguments = [_pack(argument) if isinstance(argument, Tensor) else argument for argument in arguments]
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        if self._value is None:
            self._value = self._function(*map(_unpack, self._arguments))
        return self._value


class _Codes:
    """A result in fewer bits, decoded once."""

    __slots__ = ("_dtype", "_encoded", "_shape", "_value")

    def __init__(self, values: Tensor, codec: str) -> None:
        self._encoded = Encoded.of(values.flatten(0, -2), codec)
        self._shape, self._dtype = values.shape, values.dtype
        self._value: Tensor | None = None
        watcher = _watcher.get()
        if watcher is not None:
            for part in (self._encoded.payload, self._encoded.scales):
                if part is not None:
                    watcher(part)

    def value(self) -> Tensor:
        if self._value is None:
            self._value = self._encoded.decode(self._dtype).view(self._shape)
        return self._value


class _Again:
    """How to compute a result a second time, with its graph."""

    __slots__ = ("_device_states", "_function", "_inputs", "_random_state", "_result")

    def __init__(self, function: Callable[..., Tensor], tensors: Sequence[Tensor], draws: bool) -> None:
        self._function = function
        self._inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        self._random_state = torch.get_rng_state() if draws else None
        self._device_states = get_device_states(*tensors) if draws else ([], [])
        self._result: Tensor | None = None

    def value(self) -> Tensor:
        return self._with_graph().detach()

    def gradients(self, of_result: Tensor) -> Iterator[Tensor | None]:
        """Of each input; None of one that needs none."""
        asked = [one for one in self._inputs if one.requires_grad]
        found = iter(torch.autograd.grad(self._with_graph(), asked, of_result))
        self._result = None
        return (next(found) if one.requires_grad else None for one in self._inputs)

    def _with_graph(self) -> Tensor:
        if self._result is None:
            devices, states = self._device_states
            kind = self._inputs[0].device.type
            fork = torch.random.fork_rng(devices, enabled=self._random_state is not None, device_type=kind)
            with torch.enable_grad(), fork:
                if self._random_state is not None:
                    torch.set_rng_state(self._random_state)
                    set_device_states(devices, states, device_type=kind)
                self._result = self._function(*self._inputs)
        return self._result


class _RunAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: _Again, *tensors: Tensor) -> Tensor:
        ctx.recipe = recipe
        return recipe._function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_result: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.recipe.gradients(of_result)


class _Dropped(NamedTuple):
    """A view of a result that is not kept."""

    recipe: _Recipe | _Codes | _Again
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int | torch.SymInt


# Hooks cost the host a few microseconds a tensor, so that `consume` alone has them.


def _pack(tensor: Tensor) -> Tensor | _Dropped:
    base = tensor._base
    recipe = getattr(tensor if base is None else base, "_recipe", None)
    if recipe is None:
        return tensor
    return _Dropped(recipe, tensor.shape, tensor.stride(), tensor.storage_offset())


def _pack_watched(watcher: Callable[[Tensor], None], tensor: Tensor) -> Tensor | _Dropped:
    packed = _pack(tensor)
    if packed is tensor:
        watcher(tensor)
    return packed


def _unpack(packed: Any) -> Any:
    if type(packed) is _Dropped:
        return packed.recipe.value().as_strided(packed.shape, packed.strides, packed.offset)
    return packed
