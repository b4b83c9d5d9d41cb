"""Lossless compression of coded tensors: zstd's entropy coder takes out what codes leave unused of their bytes.

Codes of a scale for many values are far from equally frequent, and exponents of floats still less so; hardly any string
of bytes comes twice. So what pays is zstd's Huffman stage, and its search for repetitions is set to the cheapest.
"""

from __future__ import annotations

import threading

import numpy as np
import zstandard

from fedbert_ds.errors import WireError

_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6)


class _Contexts(threading.local):
    """zstd's, which are costly to make and serve one thread each."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def compress(content: bytes, itemsize: int) -> bytes:
    """One zstd frame of the values in `content`, each of `itemsize` bytes: first all first bytes, then all second ones.

    Apart from each other, bytes with an exponent in them are not diluted by those of random fractions.
    """
    planes = np.frombuffer(content, np.uint8).reshape(-1, itemsize).T
    return _contexts.compressor.compress(np.ascontiguousarray(planes).data)


def largest_frame(num_bytes: int) -> int:
    """Bytes that `compress` may need for so many: what cannot be compressed becomes a little longer."""
    return num_bytes + num_bytes // 128 + 1024


def decompress(frame: bytes, num_bytes: int, itemsize: int, what: str) -> bytes:
    """What `compress` was given; WireError naming `what` unless it is `num_bytes`, before memory for more is taken."""
    try:
        promised = zstandard.get_frame_parameters(frame).content_size
        if promised != num_bytes:
            raise WireError(f"{what}: {promised} bytes when decompressed instead of {num_bytes}")
        content: bytes = _contexts.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WireError(f"{what}: cannot be decompressed: {error}") from error
    if itemsize == 1:
        return content
    values = np.empty((num_bytes // itemsize, itemsize), np.uint8)
    for place, plane in enumerate(np.frombuffer(content, np.uint8).reshape(itemsize, -1)):
        values[:, place] = plane
    return values.tobytes()
