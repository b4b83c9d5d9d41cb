"""Tensor frames: an encoded tensor as a message, and back; only an expected frame is taken.

`fedbert_kernels.encoded` rounds and scales, on the tensor's device; framing and checks are here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedbert_ds.errors import NotFinite, WireError
from fedbert_ds.wire.compression import compress, decompress_planes, put_together
from fedbert_ds.wire.fedbert_pb2 import TensorFrame
from fedbert_kernels.encoded import NAMES, Encoded, form

LARGEST_VALUE = 1e6
"""Above any value of a sane run; larger ones could overflow a micro-batch shared by clients."""
LARGEST_SUM = 1e12
"""As many clients as there may ever be, added up: what a client takes from the server."""


def encode(tensor: Tensor, codec: str, seed: int | None = None, *, compressed: bool = False) -> TensorFrame:
    """Frame a tensor [rows, width] of any float dtype, on any device.

    `fp32` is exact for fp32 input; the others round to nearest even. With `seed`, codecs with
    scales round up or down at random, unbiased; one seed gives the same bytes each time.
    `compressed` compresses without loss. Raises WireError for values that are not finite, which
    rounding would hide.
    """
    if codec not in NAMES:
        raise WireError(f"codec {codec!r} is unknown; choose one of {', '.join(NAMES)}")
    return to_frame(Encoded.of(tensor.detach(), codec, seed), compressed=compressed)


def decode(
    frame: TensorFrame,
    shape: Sequence[int],
    codec: str,
    what: str,
    device: torch.device | str = "cpu",
    largest: float = LARGEST_VALUE,
) -> Tensor:
    """The fp32 tensor of `shape`, [rows, width], in a frame of `codec`; it moves to `device` coded.

    Raises WireError as `from_frame`.
    """
    return from_frame(frame, shape, codec, what, largest=largest).to(device).decode()


def to_frame(encoded: Encoded, *, compressed: bool = False) -> TensorFrame:
    """Frame an encoded tensor. Raises NotFinite for values that were not."""
    if not encoded.is_finite:
        raise NotFinite(
            "an activation or gradient is not finite; lower optimizer.lr, raise optimizer.warmup_windows "
            "or check the checkpoint the run continues from"
        )
    payload, scales = encoded.payload, encoded.scales
    return TensorFrame(
        codec=encoded.codec,
        shape=(len(encoded), encoded.width),
        compressed=compressed,
        payload=_bytes(payload, compressed),
        scales=_bytes(payload.new_empty(0) if scales is None else scales, compressed),
    )


def from_frame(
    frame: TensorFrame,
    shape: Sequence[int],
    codec: str,
    what: str,
    *,
    pinned: bool = False,
    largest: float = LARGEST_VALUE,
) -> Encoded:
    """The encoded tensor of `shape`, [rows, width], in a frame of `codec`, on the CPU; `pinned` in
    memory that a GPU copies from by itself.

    Raises WireError naming `what` for another shape, codec or size, and for values that are not
    finite or beyond `largest`. Sizes are compared before memory is allocated.
    """
    if len(frame.shape) != len(shape) or tuple(frame.shape) != tuple(shape):
        raise WireError(f"{what}: shape {frame.shape[:8]} instead of {list(shape)}")
    if frame.codec != codec:
        raise WireError(f"{what}: codec {frame.codec[:20]!r} instead of {codec!r}")
    rows, width = shape
    payload_form, scale_form = form(width, codec)
    no_scales = 0, torch.float32
    # Every access to a field copies it.
    payload = _planes(frame.payload, frame.compressed, rows, payload_form, what)
    scales = _planes(frame.scales, frame.compressed, rows, scale_form or no_scales, f"{what}: scales")
    encoded = Encoded(
        codec,
        width,
        _tensor(payload, frame.compressed, rows, payload_form, pinned),
        None if scale_form is None else _tensor(scales, frame.compressed, rows, scale_form, pinned),
    )
    if not encoded.bound <= largest:
        _check_values(encoded, what, largest)
    return encoded


def frame_bytes(rows: int, width: int, codec: str) -> tuple[int, int]:
    """Bytes of payload and scales in the frame of a tensor [rows, width], uncompressed."""
    payload, scales = form(width, codec)
    return _num_bytes(rows, payload), _num_bytes(rows, scales) if scales else 0


def payload_itemsize(codec: str) -> int:
    """Bytes of one entry of a payload."""
    return form(1, codec)[0][1].itemsize


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


def _shifts(num_rows: int) -> np.ndarray:
    """Places of a row number's bits, highest first; none for one row."""
    return np.arange((num_rows - 1).bit_length())[::-1]


def _whole_bytes(bits: int) -> int:
    return -(-bits // 8)


def _num_bytes(rows: int, part: tuple[int, torch.dtype]) -> int:
    columns, dtype = part
    return rows * columns * dtype.itemsize


def _planes(field: bytes, compressed: bool, rows: int, part: tuple[int, torch.dtype], what: str) -> bytes:
    """The bytes of a frame's payload or scales, as they are or in compression's planes."""
    num_bytes = _num_bytes(rows, part)
    if compressed:
        return decompress_planes(field, num_bytes, what)
    if len(field) != num_bytes:
        raise WireError(f"{what}: {len(field)} bytes instead of {num_bytes}")
    return field


def _tensor(planes: bytes, compressed: bool, rows: int, part: tuple[int, torch.dtype], pinned: bool) -> Tensor:
    columns, dtype = part
    content = torch.empty(len(planes), dtype=torch.uint8, pin_memory=pinned)
    put_together(planes, dtype.itemsize if compressed else 1, content.numpy())
    return content.view(dtype).view(rows, columns)


def _check_values(encoded: Encoded, what: str, allowed: float) -> None:
    """Decode it: its bound is larger than its values."""
    largest = float(encoded.decode().abs().max())  # NaN if any value is
    if not math.isfinite(largest):
        raise WireError(
            f"{what}: a value is not finite; lower optimizer.lr or raise optimizer.warmup_windows, unless only this "
            "client sends such"
        )
    if largest > allowed:
        raise WireError(
            f"{what}: a value of {largest:.3g}, beyond {allowed:.0e}, which no sound training reaches; lower "
            "optimizer.lr or raise optimizer.warmup_windows"
        )


def _bytes(tensor: Tensor, compressed: bool) -> bytes:
    content = byte_view(tensor.cpu().contiguous())
    return compress(content, tensor.itemsize) if compressed else bytes(content)
