"""Chooses LayerNorm and GELU for a card: our kernels where measured faster than torch.compile's.

Both move the same bytes, so a compiler may be as good; the outcome depends on card, width and
releases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedbert_kernels import compiled_rows, gelu, layer_norm, row_philox
from fedbert_kernels.choice import OURS
from fedbert_kernels.compiled_rows import compiled_bias_gelu, compiled_residual_layer_norm
from fedbert_kernels.gelu import bias_gelu
from fedbert_kernels.launch import digest
from fedbert_kernels.layer_norm import residual_layer_norm

LAYER_NORM, GELU = "layer norm", "GELU"
COMPILED = "torch.compile"
ROWS = 8192
"""Of each tensor, as a micro-batch has them: 12 MB in bf16 at width 768. Larger ones would be
compared by memory alone, where a run also feels the cache and the host's launches."""


@dataclass(frozen=True)
class RowCase:
    """One measurement's kernel, dtype, width and dropout; a `choice.Case`."""

    kernel: str
    """LAYER_NORM or GELU."""
    dtype: torch.dtype
    width: int
    dropout: float = 0.0
    """Drop probability in training; every one but 0 costs the same."""

    @property
    def name(self) -> str:
        """Kernel, dtype, width and whether there is dropout."""
        dropout = " dropout" if self.dropout else ""
        return f"{self.kernel} {str(self.dtype).removeprefix('torch.')} {self.width}{dropout}"

    @property
    def default(self) -> str:
        """A tie goes to torch.compile."""
        return COMPILED

    @property
    def off_gpu(self) -> str:
        """Our operators' CPU bodies."""
        return OURS

    @property
    def digest(self) -> str:
        """Of both kernels and of what torch.compile gets."""
        return digest(gelu.__file__, layer_norm.__file__, row_philox.__file__, compiled_rows.__file__)

    def releases(self) -> dict[str, str]:
        """Both ways, of no package but torch and Triton."""
        return {OURS: "", COMPILED: ""}

    def missing(self) -> dict[str, str]:
        """None."""
        return {}

    def step(self, way: str, device: torch.device, num_rows: int = ROWS) -> Callable[[], tuple[Tensor, ...]]:
        """A call of forward and backward over tensors of `num_rows`; it returns all gradients."""
        compute = operator(self.kernel, way)
        num_large, num_parameters, numbers = (2, 3, (self.dropout, 1e-12)) if self.kernel == LAYER_NORM else (1, 1, ())
        sizes = [(num_rows, self.width)] * num_large + [(self.width,)] * num_parameters
        inputs = [torch.randn(size, device=device, dtype=self.dtype, requires_grad=True) for size in sizes]
        dy = torch.randn(num_rows, self.width, device=device, dtype=self.dtype)
        return lambda: torch.autograd.grad(compute(*inputs, *numbers), inputs, dy)


def operator(kernel: str, way: str) -> Callable[..., Tensor]:
    """The function that computes LAYER_NORM or GELU: our kernel, or torch.compile's."""
    if kernel == GELU:
        return bias_gelu if way == OURS else compiled_bias_gelu
    return residual_layer_norm if way == OURS else compiled_residual_layer_norm
