"""Tensor frames: a tensor as codec, shape and bytes, and back; only an expected frame is decoded.

`fedbert_kernels.quantize` rounds and scales, on the tensor's device; framing and checks are here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedbert_ds.errors import WireError
from fedbert_ds.wire.compression import Buffer, compress, decompress
from fedbert_ds.wire.fedbert_pb2 import TensorFrame
from fedbert_kernels.quantize import CODECS, FLOATS, dequantize, quantize

LARGEST_VALUE = 1e6
"""Above any value of a sane run; larger ones could overflow a micro-batch shared by clients."""

UNSCALED = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Codecs without scales: a dtype each. `CODECS` are the codecs with scales."""
NAMES = (*UNSCALED, *CODECS)


def encode(tensor: Tensor, codec: str, seed: int | None = None, *, compressed: bool = False) -> TensorFrame:
    """Frame a tensor [rows, width] of any float dtype, on any device.

    `fp32` is exact for fp32 input; the others round to nearest even. With `seed`, codecs with
    scales round up or down at random, unbiased; one seed gives the same bytes each time.
    `compressed` compresses without loss. Raises WireError for values that are not finite, which
    rounding would hide.
    """
    values = tensor.detach()
    if codec in UNSCALED:
        payload = values.to(UNSCALED[codec])
        scales, checked = payload.new_empty(0), payload
    elif codec in CODECS:
        values = values if values.dtype in FLOATS else values.to(torch.float32)
        random = None if seed is None else torch.tensor([seed, 0], device=values.device)
        payload, scales = quantize(values, codec, seed=random)
        checked = scales  # infinite for a value that is not finite
    else:
        raise WireError(f"codec {codec!r} is unknown; choose one of {', '.join(NAMES)}")
    if not torch.isfinite(checked).all():
        raise WireError(
            "an activation or gradient is not finite; lower optimizer.lr, raise optimizer.warmup_windows "
            "or check the checkpoint the run continues from"
        )
    parts = {
        name: compress(_bytes(part), part.itemsize) if compressed else _bytes(part)
        for name, part in (("payload", payload), ("scales", scales))
    }
    return TensorFrame(codec=codec, shape=values.shape, compressed=compressed, **parts)


def decode(
    frame: TensorFrame, shape: Sequence[int], codec: str, what: str, device: torch.device | str = "cpu"
) -> Tensor:
    """The fp32 tensor of `shape`, [rows, width], in a frame of `codec`; it moves to `device` coded.

    Raises WireError naming `what` for another shape, codec or size, and for values that are not
    finite or beyond LARGEST_VALUE. Sizes are compared before memory is allocated.
    """
    if len(frame.shape) != len(shape) or tuple(frame.shape) != tuple(shape):
        raise WireError(f"{what}: shape {frame.shape[:8]} instead of {list(shape)}")
    if frame.codec != codec:
        raise WireError(f"{what}: codec {frame.codec[:20]!r} instead of {codec!r}")
    rows, width = shape
    payload_bytes, scale_bytes = frame_bytes(rows, width, codec)
    payload_type, scale_type = frame_dtypes(codec)
    # Every access to a field copies it.
    coded = _content(frame.payload, frame.compressed, payload_bytes, payload_type, what)
    coded_scales = _content(frame.scales, frame.compressed, scale_bytes, scale_type, f"{what}: scales")
    if codec in UNSCALED:
        values = _tensor(coded, payload_type).view(rows, width).to(device).to(torch.float32)
    else:
        form = CODECS[codec]
        payload = _tensor(coded, payload_type).view(rows, form.payload_width(width)).to(device)
        scales = _tensor(coded_scales, scale_type).view(rows, form.num_scales(width)).to(device)
        values = dequantize(payload, scales, codec, width)
    if values.numel():
        largest = float(values.abs().max())  # NaN if any value is
        if not math.isfinite(largest):
            raise WireError(f"{what}: a value is not finite")
        if largest > LARGEST_VALUE:
            raise WireError(f"{what}: a value of {largest:.3g}; the largest allowed is {LARGEST_VALUE:.0e}")
    return values


def frame_bytes(rows: int, width: int, codec: str) -> tuple[int, int]:
    """Bytes of payload and scales in the frame of a tensor [rows, width], uncompressed."""
    if codec in UNSCALED:
        return rows * width * UNSCALED[codec].itemsize, 0
    form = CODECS[codec]
    payload = rows * form.payload_width(width) * form.payload.itemsize
    return payload, rows * form.num_scales(width) * form.scale_dtype.itemsize


def frame_dtypes(codec: str) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of payload and scales; codecs without scales name one, too."""
    return (UNSCALED[codec], torch.float32) if codec in UNSCALED else (CODECS[codec].payload, CODECS[codec].scale_dtype)


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, writable, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def encode_row_index(row_index: Tensor, num_rows: int) -> bytes:
    """Row numbers [tokens], each below `num_rows`, in the fewest whole bits."""
    numbers = row_index.cpu().numpy()
    return np.packbits((numbers[:, None] >> _shifts(num_rows)) & 1).tobytes()


def decode_row_index(payload: bytes, num_tokens: int, num_rows: int, what: str) -> Tensor:
    """Row numbers [num_tokens] int64, each below `num_rows`; raises WireError otherwise."""
    shifts = _shifts(num_rows)
    num_bits = num_tokens * len(shifts)
    if len(payload) != _whole_bytes(num_bits):
        raise WireError(f"{what}: {len(payload)} bytes of row numbers instead of {_whole_bytes(num_bits)}")
    bits = np.unpackbits(np.frombuffer(payload, np.uint8), count=num_bits).reshape(num_tokens, len(shifts))
    index = (bits.astype(np.int64) << shifts).sum(axis=1)
    if num_tokens and int(index.max()) >= num_rows:
        raise WireError(f"{what}: a row number is not below {num_rows}")
    return torch.from_numpy(index)


def encode_positions(positions: Tensor, num_tokens: int) -> bytes:
    """Positions among `num_tokens` tokens, one bit a token: less than a list at 15 % masked."""
    chosen = np.zeros(num_tokens, dtype=np.uint8)
    chosen[positions.cpu().numpy()] = 1
    return np.packbits(chosen).tobytes()


def decode_positions(payload: bytes, num_tokens: int, num_positions: int, what: str) -> Tensor:
    """The positions [num_positions] int64, ascending; WireError for another number of them."""
    if len(payload) != _whole_bytes(num_tokens):
        raise WireError(f"{what}: {len(payload)} bytes of masked positions instead of {_whole_bytes(num_tokens)}")
    positions = np.flatnonzero(np.unpackbits(np.frombuffer(payload, np.uint8), count=num_tokens))
    if len(positions) != num_positions:
        raise WireError(f"{what}: {len(positions)} masked positions instead of {num_positions}")
    return torch.from_numpy(positions.astype(np.int64))


def _content(field: bytes, compressed: bool, num_bytes: int, dtype: torch.dtype, what: str) -> Buffer:
    """A frame's payload or scales, decompressed if they were compressed."""
    if compressed:
        return decompress(field, num_bytes, dtype.itemsize, what)
    if len(field) != num_bytes:
        raise WireError(f"{what}: {len(field)} bytes instead of {num_bytes}")
    return field


def _shifts(num_rows: int) -> np.ndarray:
    """Places of a row number's bits, highest first; none for one row."""
    return np.arange((num_rows - 1).bit_length())[::-1]


def _whole_bytes(bits: int) -> int:
    return -(-bits // 8)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().flatten().view(torch.uint8).numpy().tobytes()


def _tensor(payload: Buffer, dtype: torch.dtype) -> Tensor:
    if not payload:
        return torch.empty(0, dtype=dtype)
    # torch shares only memory it may write to.
    return torch.frombuffer(payload if isinstance(payload, bytearray) else bytearray(payload), dtype=dtype)
