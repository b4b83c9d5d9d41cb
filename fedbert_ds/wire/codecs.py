"""Tensor frames: a tensor as codec, shape and bytes, and back; nothing is decoded that was not expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedbert_ds.errors import WireError
from fedbert_ds.wire.fedbert_pb2 import TensorFrame

LARGEST_VALUE = 1e6
"""Above any activation or gradient of a sane run; larger ones could overflow what clients share: a micro-batch."""

BYTES_PER_VALUE = {"fp32": 4, "bf16": 2, "int8": 1}


def encode(tensor: Tensor, codec: str) -> TensorFrame:
    """Frame a tensor [rows, width] of any float dtype.

    `fp32` is exact for fp32 input, `bf16` rounds to nearest even, `int8` keeps one fp32 scale a row
    (symmetric, absolute maximum / 127). Raises WireError for values that are not finite: rounding would hide them.
    """
    values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
    if not torch.isfinite(values).all():
        raise WireError(
            "an activation or gradient is not finite; lower optimizer.lr, raise optimizer.warmup_windows "
            "or check the checkpoint the run continues from"
        )
    frame = TensorFrame(codec=codec, shape=values.shape)
    if codec == "fp32":
        frame.payload = _bytes(values)
    elif codec == "bf16":
        frame.payload = _bytes(values.to(torch.bfloat16).view(torch.int16))
    elif codec == "int8":
        scales = values.abs().amax(dim=1) / 127.0 if values.numel() else values.new_zeros(values.shape[0])
        # A row of zeros has scale 0; dividing by 1 instead keeps it zero.
        divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
        frame.payload = _bytes((values / divisors[:, None]).round().clamp(-127, 127).to(torch.int8))
        frame.scales = _bytes(scales)
    else:
        raise WireError(f"codec {codec!r} is unknown; choose one of {', '.join(BYTES_PER_VALUE)}")
    return frame


def decode(frame: TensorFrame, shape: Sequence[int], codec: str, what: str) -> Tensor:
    """The fp32 tensor of `shape` in a frame of `codec`.

    Raises WireError naming `what` when shape, codec, size or finiteness are not as expected; sizes are compared
    before any memory is taken.
    """
    if len(frame.shape) != len(shape) or tuple(frame.shape) != tuple(shape):
        raise WireError(f"{what}: shape {frame.shape[:8]} instead of {list(shape)}")
    if frame.codec != codec:
        raise WireError(f"{what}: codec {frame.codec[:20]!r} instead of {codec!r}")
    num_values = math.prod(shape)
    if len(frame.payload) != num_values * BYTES_PER_VALUE[codec]:
        raise WireError(f"{what}: {len(frame.payload)} bytes instead of {num_values * BYTES_PER_VALUE[codec]}")
    if len(frame.scales) != (4 * shape[0] if codec == "int8" else 0):
        raise WireError(f"{what}: {len(frame.scales)} bytes of scales")
    if codec == "fp32":
        values = _tensor(frame.payload, torch.float32)
    elif codec == "bf16":
        values = _tensor(frame.payload, torch.int16).view(torch.bfloat16).to(torch.float32)
    else:
        scales = _tensor(frame.scales, torch.float32)
        values = _tensor(frame.payload, torch.int8).to(torch.float32).view(tuple(shape)) * scales[:, None]
    values = values.view(tuple(shape))
    if values.numel():
        largest = float(values.abs().max())  # NaN if any value is
        if not math.isfinite(largest):
            raise WireError(f"{what}: a value is not finite")
        if largest > LARGEST_VALUE:
            raise WireError(f"{what}: a value of {largest:.3g}; the largest allowed is {LARGEST_VALUE:.0e}")
    return values


def encode_row_index(row_index: Tensor) -> bytes:
    """Local row numbers [tokens] as uint16; a message has at most 65,536 distinct rows."""
    if row_index.numel() and int(row_index.max()) > 0xFFFF:
        raise WireError("more than 65,536 distinct rows in one message; lower window.tokens_per_micro_batch")
    return _bytes(row_index.to(torch.int32).to(torch.uint16))


def decode_row_index(payload: bytes, num_tokens: int, num_rows: int, what: str) -> Tensor:
    """Row numbers [num_tokens] int64, each below `num_rows`; raises WireError otherwise."""
    if len(payload) != 2 * num_tokens:
        raise WireError(f"{what}: {len(payload)} bytes of row numbers instead of {2 * num_tokens}")
    index = _tensor(payload, torch.uint16).to(torch.int64)
    if num_tokens and int(index.max()) >= num_rows:
        raise WireError(f"{what}: a row number is not below {num_rows}")
    return index


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def _tensor(payload: bytes, dtype: torch.dtype) -> Tensor:
    if not payload:
        return torch.empty(0, dtype=dtype)
    # bytearray: torch refuses to share memory it might write to.
    return torch.frombuffer(bytearray(payload), dtype=dtype)
