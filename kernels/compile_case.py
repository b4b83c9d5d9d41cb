"""One specialization of a kernel, described well enough to be compiled without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities that every kernel compiles for: Ampere, Hopper, Blackwell."""


@dataclass(frozen=True)
class CompileCase:
    """A kernel with its argument types, constants and launch options; each kernel file has `compile_cases()`."""

    name: str
    """Stable, and with an architecture unique: it names the row of the golden table, `attention_forward bf16 d64`."""
    kernel: Any
    """The `triton.jit` function."""
    signature: Mapping[str, str]
    """Type of each argument that is not a constant, by name: `*bf16`, `*i32`, `i32`, `fp32`, as Triton spells them."""
    constants: Mapping[str, Any]
    """Value of each `tl.constexpr` argument, by name."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Launch options: num_warps, num_stages, enable_fp_fusion, ..., the same as the launch function passes."""
    divisible_by_16: tuple[str, ...] = ()
    """Integer arguments that are multiples of 16 in practice; pointers are always taken to be aligned."""
    architectures: tuple[int, ...] = ARCHITECTURES
    spill_free: bool = True
    """Whether a register spill fails the check."""
    tensor_cores: bool = False
    """Whether the absence of tensor-core instructions fails the check."""
