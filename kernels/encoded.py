"""A tensor as codes and scales, on any device: what crosses the wire, and the way to a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fedbert_kernels.quantize import CODECS, FLOATS, GROUP, dequantize, quantize

UNSCALED = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Codecs without scales: a dtype each. `CODECS` are the codecs with scales."""
NAMES = (*UNSCALED, *CODECS)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A tensor [rows, width] in a codec's form. Each row is coded apart, so rows join and split."""

    codec: str
    """One of `NAMES`."""
    width: int
    payload: Tensor
    """[rows, columns], of the codec's dtype; `form` tells both."""
    scales: Tensor | None
    """[rows, scales of a row]; None for codecs without scales."""

    @classmethod
    def of(cls, values: Tensor, codec: str, seed: int | None = None) -> Encoded:
        """Encode values [rows, width] of any float dtype, on their device.

        `fp32` is exact for fp32 values; the others round to nearest even. With `seed`, codecs with
        scales round up or down at random, unbiased. A value that is not finite stays so without
        scales, and makes its scale infinite. ValueError for an unknown codec.
        """
        if codec in UNSCALED:
            return cls(codec, values.shape[1], values.to(UNSCALED[codec]).contiguous(), None)
        values = values if values.dtype in FLOATS else values.to(torch.float32)
        random = None if seed is None else torch.tensor([seed, 0], device=values.device)
        return cls(codec, values.shape[1], *quantize(values, codec, seed=random))

    @classmethod
    def zeros(cls, rows: int, width: int, codec: str) -> Encoded:
        """Codes and scales that are zero, on the CPU, and so are the values."""
        payload, scales = (
            None if part is None else torch.zeros(rows, part[0], dtype=part[1]) for part in form(width, codec)
        )
        assert payload is not None
        return cls(codec, width, payload, scales)

    @classmethod
    def join(cls, parts: Sequence[Encoded], cat: Callable[[list[Tensor]], Tensor] = torch.cat) -> Encoded:
        """The rows of parts of one codec and width, one part after another; `cat` joins tensors."""
        scales = [part.scales for part in parts if part.scales is not None]
        payload = cat([part.payload for part in parts])
        return replace(parts[0], payload=payload, scales=cat(scales) if scales else None)

    def split(self, rows: Sequence[int]) -> list[Encoded]:
        """Parts of so many rows; they share memory with this one."""
        payloads = self.payload.split(list(rows))
        scales = [None] * len(payloads) if self.scales is None else self.scales.split(list(rows))
        return [replace(self, payload=one, scales=other) for one, other in zip(payloads, scales, strict=True)]

    def map(self, change: Callable[[Tensor], Tensor]) -> Encoded:
        """The same with both tensors changed, as by a copy to another device."""
        payload = change(self.payload)
        return replace(self, payload=payload, scales=None if self.scales is None else change(self.scales))

    def to(self, device: torch.device | str) -> Encoded:
        """The same on a device."""
        return self.map(lambda part: part.to(device))

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values [rows, width], on the device where the codes are; in fp16 or bf16 rounded."""
        if self.scales is None:
            return self.payload.to(dtype)
        return dequantize(self.payload, self.scales, self.codec, self.width, dtype)

    @property
    def is_finite(self) -> bool:
        """Whether all values were finite that were encoded. Waits for the device."""
        return bool(torch.isfinite(self.payload if self.scales is None else self.scales).all())

    @property
    def bound(self) -> float:
        """No decoded value is larger in magnitude; NaN or infinite if one may not be finite.

        Nothing is decoded: codes are looked at only where they may be infinite or NaN themselves.
        """
        if not self.payload.numel():
            return 0.0
        if self.scales is None:
            return _largest(self.payload)
        codec = CODECS[self.codec]
        # Below zero there is one integer code more.
        code = _largest_fp8(self.payload) if codec.mantissa_bits else codec.largest + 1
        # A rotation adds GROUP codes up, each an eighth.
        bound = code * _largest(self.scales) * (GROUP / 8 if codec.rotated else 1)
        return float(torch.tensor(bound, dtype=torch.float32))

    @cached_property
    def norm(self) -> float:
        """Euclidean norm of all values together. Decodes them, once."""
        return float(torch.linalg.vector_norm(self.decode(), dtype=torch.float64))

    @cached_property
    def row_sizes(self) -> Tensor:
        """[rows] fp32: the Euclidean norm of each row, or no less; looked at once.

        Of codecs with scales it follows from the scales, as if every code were the largest.
        """
        if self.scales is None:
            return torch.linalg.vector_norm(self.payload, dim=1, dtype=torch.float32)
        codec = CODECS[self.codec]
        columns = self.width / self.scales.shape[1]
        # A rotation is orthonormal.
        return torch.linalg.vector_norm(self.scales, dim=1, dtype=torch.float32) * (codec.largest * columns**0.5)

    def times(self, factors: Tensor) -> Encoded:
        """Each row multiplied by one of `factors` [rows]."""
        if self.scales is None:
            return replace(self, payload=(self.payload * factors[:, None]).to(self.payload.dtype))
        return replace(self, scales=(self.scales * factors[:, None]).to(self.scales.dtype))

    def __len__(self) -> int:
        return len(self.payload)


def form(width: int, codec: str) -> tuple[tuple[int, torch.dtype], tuple[int, torch.dtype] | None]:
    """(columns, dtype) of the payload of rows `width` wide, and of scales if there are any."""
    if codec in UNSCALED:
        return (width, UNSCALED[codec]), None
    it = CODECS[codec]
    return (it.payload_width(width), it.payload), (it.num_scales(width), it.scale_dtype)


def _largest(values: Tensor) -> float:
    """The largest magnitude; NaN if there is one."""
    return float(torch.stack(values.aminmax()).abs().max())


def _largest_fp8(codes: Tensor) -> float:
    # Without its sign, a code is the larger the larger its bits are; infinity and NaN are largest.
    return float((codes.view(torch.uint8) & 0x7F).max().view(codes.dtype))
