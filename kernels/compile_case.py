"""One specialization of a kernel, described well enough to compile without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities that every kernel is compiled for: Ampere, Hopper, Blackwell."""


@dataclass(frozen=True)
class CompileCase:
    """A kernel with its argument types, constants and launch options.

    Each kernel file lists its own in `compile_cases()`.
    """

    name: str
    """Stable. With an architecture it names a golden table's row: `attention_forward bf16 d64`."""
    kernel: Any
    """The `triton.jit` function."""
    signature: Mapping[str, str]
    """Type of each argument that is not a constant, as Triton spells it: `*bf16`, `i32`, `fp32`."""
    constants: Mapping[str, Any]
    """Value of each `tl.constexpr` argument, by name."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Launch options as the launch function passes them: num_warps, num_stages, ..."""
    divisible_by_16: tuple[str, ...] = ()
    """Integer arguments that are multiples of 16 in practice; pointers always count as aligned."""
    architectures: tuple[int, ...] = ARCHITECTURES
    spill_free: bool = True
    """Whether a register spill fails the check."""
    tensor_cores: bool = False
    """Whether the absence of tensor-core instructions fails the check."""
