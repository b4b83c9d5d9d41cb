"""Triton, or a stand-in where it is not installed; and corrections for its interpreter.

Kernel files take `triton` and `tl` from here, so that they import everywhere. Only a launch needs
Triton.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False

    class _Absent:
        """Lets kernels be defined without Triton: decorators return their function, names exist."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Absent(f"{self._name}.{name}")

        def __call__(self, *arguments: Any, **_: Any) -> Any:
            return arguments[0] if len(arguments) == 1 else lambda function: function

        def __getitem__(self, _: Any) -> Any:
            raise ModuleNotFoundError(f"{self._name} needs Triton, which is not installed")

    triton = _Absent("triton")
    tl = _Absent("triton.language")

jit = triton.jit
INTERPRETED = tl.constexpr(HAVE_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on"))
"""Whether kernels run in Triton's interpreter; fixed at import, as in Triton itself."""


def jit_for_any(*counts: str) -> Any:
    """`jit`, but these counts get no variant of their own where 16 divides them, or for 1.

    They change with every micro-batch: a run would stop to compile in mid-window.
    """
    return triton.jit(do_not_specialize=list(counts))


def runs_triton(tensor: Tensor) -> bool:
    """Whether a kernel can take this tensor: on a GPU with Triton, or in the interpreter."""
    return bool(INTERPRETED) or (HAVE_TRITON and tensor.is_cuda)


Function = TypeVar("Function", bound=Callable[..., Any])


def on_its_device(launch: Function) -> Function:
    """Run a launch function on its first argument's device; Triton takes the current one."""

    @functools.wraps(launch)
    def launch_there(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return launch(tensor, *arguments, **keywords)

    return launch_there  # type: ignore[return-value]


@jit
def dot(a, b, accumulator, INPUT_PRECISION: tl.constexpr):
    """a @ b + accumulator in fp32.

    The interpreter would multiply the bit patterns of bf16, so there operands are widened first.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator, input_precision=INPUT_PRECISION)


@jit
def narrow(x, DTYPE: tl.constexpr):
    """fp32 x in the float type DTYPE, rounded to nearest even.

    The interpreter would truncate to bf16, so there x is rounded first.
    """
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)
    return x.to(DTYPE)
