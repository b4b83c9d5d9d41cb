"""A client update on the wire: tensors of the client half to chunks, and back, checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedbert_ds.errors import WireError
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import LARGEST_VALUE, byte_view, decode, encode, frame_bytes, payload_itemsize
from fedbert_ds.wire.compression import (
    Buffer,
    compressed_parts,
    decompress_planes,
    from_planes,
    largest_frame,
)

CHUNK_BYTES = 1 << 20

CODED_ROWS = 1024
"""Rows of a matrix that are coded or decoded at once: what that takes is many times their codes."""

Tensors = Mapping[str, Tensor]
"""Gradients, weights or changes of weights by name, fp32: what travels."""


class ClientUpdate(NamedTuple):
    """What one client sent, and what it weighs beside others."""

    tensors: Tensors
    weight: float
    """In an average: masked tokens behind it, as the server has counted them."""


def update_chunks(
    window: int,
    tensors: Iterable[tuple[str, Tensor]],
    codec: str = "fp32",
    *,
    compressed: bool = False,
) -> Iterator[pb.UpdateChunk]:
    """An update as chunks of at most CHUNK_BYTES; the last one is without a tensor.

    Matrices are coded, their scales after the payload; all other tensors travel as fp32. Rows of
    zeros, the words no sequence held, are left out: the tensor's first chunk says which rows come.
    With `compressed` each tensor is one zstd frame, cut into chunks.
    """
    for name, tensor in tensors:
        shape, rows = tensor.shape, b""
        tensor = tensor.detach()
        if tensor.dim() == 2:
            touched = tensor.any(dim=1)
            if not touched.all():
                tensor, rows = tensor[touched], np.packbits(touched.cpu().numpy()).tobytes()
        content = _content(tensor, codec)
        parts = compressed_parts(content, _itemsize(tensor.shape, codec)) if compressed else iter([content])
        offset = 0
        for part in _in_chunks(parts):
            chunk = pb.UpdateChunk(window=window, name=name, shape=shape, offset=offset, payload=part)
            chunk.compressed = compressed
            if offset == 0:
                chunk.rows = rows
            offset += len(part)
            yield chunk
    yield pb.UpdateChunk(window=window, last=True)


def _content(tensor: Tensor, codec: str) -> Buffer:
    """A tensor's bytes: codes of all rows, then their scales, or fp32, which is not copied."""
    if not _is_coded(tensor.shape, codec):
        return byte_view(tensor.to(device="cpu", dtype=torch.float32).contiguous())
    payload_bytes, scale_bytes = frame_bytes(tensor.shape[0], tensor.shape[1], codec)
    content = bytearray(payload_bytes + scale_bytes)
    payload, scales = memoryview(content)[:payload_bytes], memoryview(content)[payload_bytes:]
    for rows in tensor.split(CODED_ROWS):
        frame = encode(rows, codec)
        payload_bytes, scale_bytes = frame_bytes(rows.shape[0], rows.shape[1], codec)
        payload[:payload_bytes], scales[:scale_bytes] = frame.payload, frame.scales
        payload, scales = payload[payload_bytes:], scales[scale_bytes:]
    return content


def _in_chunks(parts: Iterable[Buffer]) -> Iterator[bytes]:
    """The same bytes, CHUNK_BYTES at a time; at least one chunk."""
    rest = bytearray()
    chunk = None
    for part in parts:
        for start in range(0, len(part), CHUNK_BYTES):
            rest += part[start : start + CHUNK_BYTES]
            while len(rest) >= CHUNK_BYTES:
                chunk = bytes(rest[:CHUNK_BYTES])
                del rest[:CHUNK_BYTES]
                yield chunk
    if rest or chunk is None:
        yield bytes(rest)


class UpdateAssembler:
    """Joins the chunks of one update into tensors of known shapes.

    Chunks of a tensor come in order. `codec` is the sender's; `who` begins every error message. No
    value may be larger than `largest`.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        who: str,
        codec: str = "fp32",
        largest: float = LARGEST_VALUE,
    ) -> None:
        self._shapes = shapes
        self._largest = largest
        self._who = who
        self._codec = codec
        self._buffers: dict[str, bytearray] = {}
        self._compressed: set[str] = set()
        self._rows: dict[str, Tensor] = {}
        """[R] bool of each matrix sent without all its rows: the rows that come."""

    def add(self, chunk: pb.UpdateChunk) -> Tensors | None:
        """Keep a chunk; after the last one, the tensors."""
        return self.finish() if self.take(chunk) else None

    def take(self, chunk: pb.UpdateChunk) -> bool:
        """Keep a chunk's bytes; True for the last one. WireError on anything unexpected."""
        if chunk.last:
            for name, tensor_shape in self._shapes.items():
                buffer = self._buffers.get(name)
                is_plain = name not in self._compressed
                if buffer is None or (is_plain and len(buffer) != self._num_bytes(name, tensor_shape)):
                    raise WireError(f"{self._who}: tensor {name!r} did not arrive whole")
            return True
        shape = self._shapes.get(chunk.name)
        if shape is None or len(chunk.shape) != len(shape) or tuple(chunk.shape) != shape:
            name = chunk.name[:100]
            raise WireError(f"{self._who}: tensor {name!r} of shape {chunk.shape[:8]} was not expected")
        if chunk.name not in self._buffers:
            if chunk.rows:
                self._rows[chunk.name] = self._touched_rows(chunk.name, shape, chunk.rows)
            if chunk.compressed:
                self._compressed.add(chunk.name)
        buffer = self._buffers.setdefault(chunk.name, bytearray())
        num_bytes = self._num_bytes(chunk.name, shape)
        room = (largest_frame(num_bytes) if chunk.name in self._compressed else num_bytes) - len(buffer)
        has_bytes = bool(chunk.payload) or room == 0
        if chunk.offset != len(buffer) or not has_bytes or len(chunk.payload) > room:
            raise WireError(f"{self._who}: chunk of {chunk.name!r} at byte {chunk.offset} was not expected")
        buffer += chunk.payload
        return False

    def _touched_rows(self, name: str, shape: tuple[int, ...], bits: bytes) -> Tensor:
        if len(shape) != 2 or len(bits) != -(-shape[0] // 8):
            raise WireError(f"{self._who}: {len(bits)} bytes of rows for tensor {name!r} of shape {list(shape)}")
        return torch.from_numpy(np.unpackbits(np.frombuffer(bits, np.uint8), count=shape[0]).astype(bool))

    def finish(self) -> Tensors:
        """The tensors, fp32, after its last chunk; WireError for values that are not sane."""
        tensors = {}
        for name, shape in self._shapes.items():
            sent = self._decode(name, self._sent_shape(name, shape), self._content(name, shape))
            rows = self._rows.pop(name, None)
            tensors[name] = sent if rows is None else torch.zeros(shape).index_put_((rows,), sent)
        return tensors

    def _content(self, name: str, shape: tuple[int, ...]) -> Buffer:
        """A tensor's bytes, decompressed if it was compressed."""
        buffer = self._buffers.pop(name)
        if name not in self._compressed:
            return buffer
        planes = decompress_planes(buffer, self._num_bytes(name, shape), f"{self._who}: tensor {name!r}")
        # The largest tensor is as large as all others: its frame goes first.
        buffer.clear()
        return from_planes(planes, _itemsize(shape, self._codec))

    def _sent_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (int(self._rows[name].sum()), *shape[1:]) if name in self._rows else shape

    def _num_bytes(self, name: str, shape: tuple[int, ...]) -> int:
        shape = self._sent_shape(name, shape)
        if _is_coded(shape, self._codec):
            return sum(frame_bytes(shape[0], shape[1], self._codec))
        return 4 * torch.Size(shape).numel()

    def _decode(self, name: str, shape: tuple[int, ...], buffer: Buffer) -> Tensor:
        who = f"{self._who}: tensor {name!r}"
        if _is_coded(shape, self._codec):
            return self._decode_rows(shape, buffer, who)
        if not isinstance(buffer, bytearray):
            buffer = bytearray(buffer)  # torch shares only memory it may write to
        values = torch.frombuffer(buffer, dtype=torch.float32).view(shape) if buffer else torch.zeros(shape)
        # NaN if any value is
        largest = max(float(values.max()), -float(values.min())) if buffer else 0.0
        if not largest <= self._largest:
            raise WireError(f"{who} holds {largest:.3g}; at most {self._largest:.0e} is sane")
        return values

    def _decode_rows(self, shape: tuple[int, ...], buffer: Buffer, who: str) -> Tensor:
        """A coded matrix, some rows at a time."""
        values = torch.empty(shape)
        content = memoryview(buffer)
        scales = content[frame_bytes(shape[0], shape[1], self._codec)[0] :]
        for rows in values.split(CODED_ROWS):
            payload_bytes, scale_bytes = frame_bytes(len(rows), shape[1], self._codec)
            parts = {"payload": bytes(content[:payload_bytes]), "scales": bytes(scales[:scale_bytes])}
            content, scales = content[payload_bytes:], scales[scale_bytes:]
            frame = pb.TensorFrame(codec=self._codec, shape=rows.shape, **parts)
            rows.copy_(decode(frame, rows.shape, self._codec, who, largest=self._largest))
        return values


def _is_coded(shape: Sequence[int], codec: str) -> bool:
    """Whether a tensor of this shape is coded, rather than fp32."""
    return codec != "fp32" and len(shape) == 2


def _itemsize(shape: Sequence[int], codec: str) -> int:
    """Bytes of one value; a codec with scales has codes of one byte."""
    return payload_itemsize(codec) if _is_coded(shape, codec) else 4
