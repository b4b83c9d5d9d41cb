"""Cheap results are computed again in backward, not kept until then.

Autograd keeps the inputs of a matrix product for its backward. Where such an input is the result of
`cheap`, `consume` runs the product, and both are inside `recomputing`, its recipe is kept instead:
function and arguments, which are kept for other reasons, or are such results themselves. Backward
computes each once, with the same bits. No matrix product runs again.

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

_is_active: ContextVar[bool] = ContextVar("_is_active", default=False)
_watcher: ContextVar[Callable[[Tensor], None] | None] = ContextVar("_watcher", default=None)


def cheap(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, which must give the same bits whenever it is called."""
    result = function(*arguments)
    if not torch.compiler.is_compiling() and _is_active.get() and result.requires_grad:
        whole = result if result._base is None else result._base
        whole._recipe = _Recipe(function, arguments)  # type: ignore[attr-defined]
    return result


def consume(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, whose graph keeps recipes in place of cheap results."""
    # A compiler that traces this cannot read a context, and chooses itself what it keeps.
    if torch.compiler.is_compiling() or not _is_active.get():
        return function(*arguments)
    watcher = _watcher.get()
    pack = _pack if watcher is None else partial(_pack_watched, watcher)
    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        return function(*arguments)


@contextmanager
def recomputing() -> Iterator[None]:
    """Inside, `cheap` notes recipes and `consume` keeps them."""
    token = _is_active.set(True)
    try:
        yield
    finally:
        _is_active.reset(token)


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


class _Dropped(NamedTuple):
    """A view of a result that is not kept."""

    recipe: _Recipe
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
