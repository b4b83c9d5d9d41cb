"""Lossless compression of coded tensors with zstd.

Some codes are far more frequent than others, and exponents of floats still more so; strings of
bytes hardly ever repeat. zstd's Huffman stage does the work; its search for repetitions is set to
the cheapest.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import zstandard

from fedbert_ds.errors import WireError

Buffer = bytes | bytearray | memoryview

BLOCK_BYTES = 1 << 20
"""Bytes of a plane that are gathered at once."""

_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6)


class _Contexts(threading.local):
    """zstd's contexts: costly to make, and for one thread each."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def compress(content: Buffer, itemsize: int) -> bytes:
    """One zstd frame of values of `itemsize` bytes: all first bytes, then all second ones, ...

    Bytes with an exponent compress better apart from the random bytes of fractions.
    """
    return b"".join(compressed_parts(content, itemsize))


def compressed_parts(content: Buffer, itemsize: int) -> Iterator[bytes]:
    """The frame of `compress` in parts, none of them large: `content` is not copied as a whole."""
    values = np.frombuffer(content, np.uint8).reshape(-1, itemsize)
    frame = _contexts.compressor.compressobj(size=values.size)
    for plane in values.T:
        for start in range(0, len(plane), BLOCK_BYTES):
            yield frame.compress(np.ascontiguousarray(plane[start : start + BLOCK_BYTES]).data)
    yield frame.flush()


def largest_frame(num_bytes: int) -> int:
    """Most bytes `compress` may need for `num_bytes`: random bytes grow a little."""
    return num_bytes + num_bytes // 128 + 1024


def decompress(frame: Buffer, num_bytes: int, itemsize: int, what: str) -> Buffer:
    """The content of `compress`'s frame, `num_bytes` long.

    Raises WireError naming `what` for another length, before memory is allocated, and for a damaged
    frame.
    """
    return from_planes(decompress_planes(frame, num_bytes, what), itemsize)


def decompress_planes(frame: Buffer, num_bytes: int, what: str) -> bytes:
    """As `decompress`, but the planes as they are in the frame, which can be dropped before they
    are put together: a large one.
    """
    try:
        promised = zstandard.get_frame_parameters(frame).content_size
        if promised != num_bytes:
            raise WireError(f"{what}: {promised} bytes when decompressed instead of {num_bytes}")
        planes: bytes = _contexts.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WireError(f"{what}: cannot be decompressed: {error}") from error
    return planes


def from_planes(planes: bytes, itemsize: int) -> Buffer:
    """Values of `itemsize` bytes whose first bytes come first, then all second ones, ..."""
    if itemsize == 1:
        return planes
    content = bytearray(len(planes))
    put_together(planes, itemsize, np.frombuffer(content, np.uint8))
    return content


def put_together(planes: bytes, itemsize: int, content: np.ndarray) -> None:
    """As `from_planes`, into `content`, uint8, of the same size."""
    values = content.reshape(-1, itemsize)
    for place, plane in enumerate(np.frombuffer(planes, np.uint8).reshape(itemsize, -1)):
        values[:, place] = plane
