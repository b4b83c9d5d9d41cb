"""Which small kernels torch.compile beats on a card, and what runs there in their place.

The bytes that LayerNorm and GELU must move are the same for everybody, so a compiler may well be as good. Whether it is
depends on the card: `fedbert-ds bench kernels --tune` measures both and keeps here who was faster. Without a
measurement the fused kernels run.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fedbert_kernels import gelu, layer_norm, row_philox
from fedbert_kernels.attention_launches import capability
from fedbert_kernels.gelu import bias_gelu
from fedbert_kernels.interpreter import triton
from fedbert_kernels.launch import GAIN, digest, table_path
from fedbert_kernels.layer_norm import residual_layer_norm

LAYER_NORM, GELU = "layer norm", "GELU"


def fused_bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """`bias_gelu` by whoever is faster on x's card."""
    if _is_beaten(GELU, x, 0.0):
        return compiled(_bias_gelu)(x, bias)
    return bias_gelu(x, bias)


def fused_residual_layer_norm(
    x: Tensor, residual: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, dropout: float, epsilon: float
) -> Tensor:
    """`residual_layer_norm` by whoever is faster on x's card; dropout follows torch's generator either way."""
    if _is_beaten(LAYER_NORM, x, dropout):
        return compiled(_residual_layer_norm)(x, residual, bias, weight, shift, dropout, epsilon)
    return residual_layer_norm(x, residual, bias, weight, shift, dropout, epsilon)


def shape_class(kernel: str, dtype: torch.dtype, width: int, dropout: float) -> str:
    """What measurements are kept by."""
    return f"{kernel} {str(dtype).removeprefix('torch.')} {width}" + (" dropout" if dropout else "")


def keep_choices(milliseconds: Mapping[str, tuple[float, float]], device: int) -> dict[str, bool]:
    """Write down who is faster, from {shape class: (ours, torch.compile's)}; {shape class: whether ours is kept}.

    torch.compile takes over only where it is clearly faster: less than `GAIN` of the time.
    """
    kept = {name: compiled_one >= GAIN * ours for name, (ours, compiled_one) in milliseconds.items()}
    path = choices_path(device)
    beaten = (_beaten_on(device) - kept.keys()) | {name for name, is_kept in kept.items() if not is_kept}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as scratch:
        json.dump({"kernels": _digest(), "beaten": sorted(beaten)}, scratch, indent=1)
    os.replace(scratch.name, path)
    _beaten_on.cache_clear()
    return kept


def choices_path(device: int) -> Path:
    """Where the choices of this card lie, or would lie; another release of torch may compile better."""
    table = table_path(torch.cuda.get_device_name(device), capability(device), triton.__version__)
    return table.with_name(f"{table.stem}-torch-{torch.__version__.split('+')[0]}-rows.json")


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function as torch.compile makes it, for any number of rows."""
    return torch.compile(function, dynamic=True)


def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias.to(x.dtype))


def _residual_layer_norm(
    x: Tensor, residual: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, dropout: float, epsilon: float
) -> Tensor:
    h = residual + F.dropout(x + bias.to(x.dtype), dropout)
    return F.layer_norm(h, h.shape[-1:], weight.to(h.dtype), shift.to(h.dtype), epsilon)


def _is_beaten(kernel: str, x: Tensor, dropout: float) -> bool:
    if not x.is_cuda:
        return False
    index = torch.cuda.current_device() if x.device.index is None else x.device.index
    return shape_class(kernel, x.dtype, x.shape[-1], dropout) in _beaten_on(index)


@functools.cache
def _beaten_on(device: int) -> frozenset[str]:
    """Read once; empty where nobody has measured, or other kernels were measured."""
    try:
        table = json.loads(choices_path(device).read_text(encoding="utf-8"))
        beaten: Iterable[str] = table["beaten"] if table["kernels"] == _digest() else ()
        return frozenset(map(str, beaten))
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


@functools.cache
def _digest() -> str:
    return digest(gelu.__file__, layer_norm.__file__, row_philox.__file__)
