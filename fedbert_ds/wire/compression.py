"""Lossless compression of coded tensors with zstd.

Some codes are far more frequent than others, and exponents of floats still more so; strings of
bytes hardly ever repeat. zstd's Huffman stage does the work; its search for repetitions is set to
the cheapest.
"""

from __future__ import annotations

import threading

import numpy as np
import zstandard

from fedbert_ds.errors import WireError

_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6)


class _Contexts(threading.local):
    """zstd's contexts: costly to make, and for one thread each."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def compress(content: bytes, itemsize: int) -> bytes:
    """One zstd frame of values of `itemsize` bytes: all first bytes, then all second ones, ...

    Bytes with an exponent compress better apart from the random bytes of fractions.
    """
    planes = np.frombuffer(content, np.uint8).reshape(-1, itemsize).T
    return _contexts.compressor.compress(np.ascontiguousarray(planes).data)


def largest_frame(num_bytes: int) -> int:
    """Most bytes `compress` may need for `num_bytes`: random bytes grow a little."""
    return num_bytes + num_bytes // 128 + 1024


def decompress(frame: bytes, num_bytes: int, itemsize: int, what: str) -> bytes:
    """The content of `compress`'s frame, `num_bytes` long.

    Raises WireError naming `what` for another length, before memory is allocated, and for a damaged
    frame.
    """
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
