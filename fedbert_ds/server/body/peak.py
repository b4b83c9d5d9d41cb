"""The rates that a body's FLOP/s are compared with: a dense matrix product's, the data sheet's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

NOMINAL_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "A100": 312, "L40S": 362}
"""Dense products of 16-bit floats, by what the card's name holds; the makers' data sheets."""

CALLS = 5


@dataclass(frozen=True)
class Peak:
    """FLOP/s that devices can reach."""

    measured: float
    """With a dense matrix product, measured."""
    nominal: float | None
    """By the data sheet; None where it is not known."""


def together(peaks: Sequence[Peak]) -> Peak:
    """Of several devices."""
    nominal = [peak.nominal for peak in peaks]
    all_known = sum(rate for rate in nominal if rate is not None) if None not in nominal else None
    return Peak(sum(peak.measured for peak in peaks), all_known)


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak:
    """Measure the device, which takes a fraction of a second."""
    size = None if device.type == "cuda" else 512
    product, flops = matmul(device, dtype, size)
    module = torch.get_device_module(device)
    product()
    module.synchronize()
    started = time.monotonic()
    for _ in range(CALLS):
        product()
    module.synchronize()
    return Peak(CALLS * flops / (time.monotonic() - started), nominal_rate(device, dtype))


def matmul(device: torch.device, dtype: torch.dtype, size: int | None = None) -> tuple[Callable[[], Any], float]:
    """A product of square matrices that saturates the device, and its floating-point operations."""
    size = size or (8192 if device.type == "cuda" else 1024)
    # Zeros would draw less power. The run's own random numbers stay as they are.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    return lambda: left @ right, 2.0 * size**3


def nominal_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """The card's nominal peak in FLOP/s, which no product reaches; None where it is not known."""
    if device.type != "cuda" or dtype.itemsize != 2:
        return None
    name = torch.cuda.get_device_properties(device).name
    known = [card for card in NOMINAL_TFLOPS if card in name]
    return NOMINAL_TFLOPS[max(known, key=len)] * 1e12 if known else None
