"""A client update on the wire: tensors of the client half to chunks, and back, checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedbert_ds.errors import WireError
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import LARGEST_VALUE, decode, encode, frame_bytes, frame_dtypes
from fedbert_ds.wire.compression import compress, decompress, largest_frame

CHUNK_BYTES = 1 << 20

LARGEST_WEIGHT = 2.0**53
"""Largest count of tokens that a double keeps exactly."""


class ClientUpdate(NamedTuple):
    """Gradients, weights or changes of weights, fp32, as one client sends them."""

    tensors: Mapping[str, Tensor]
    weight: float
    """The update's weight in an average: masked tokens behind it."""


def update_chunks(
    window: int,
    tensors: Iterable[tuple[str, Tensor]],
    weight: float,
    codec: str = "fp32",
    *,
    compressed: bool = False,
) -> Iterator[pb.UpdateChunk]:
    """An update as chunks of at most CHUNK_BYTES; a last chunk, without a tensor, has `weight`.

    Matrices are coded, their scales after the payload; all other tensors travel as fp32. Rows of
    zeros, the words no sequence held, are left out: the tensor's first chunk says which rows come.
    With `compressed` each tensor is one zstd frame, cut into chunks.
    """
    for name, tensor in tensors:
        shape, rows = tensor.shape, b""
        tensor = tensor.detach()
        if tensor.dim() == 2:
            touched = (tensor != 0).any(dim=1)
            if not touched.all():
                tensor, rows = tensor[touched], np.packbits(touched.cpu().numpy()).tobytes()
        if _is_coded(tensor.shape, codec):
            frame = encode(tensor, codec)
            payload = frame.payload + frame.scales
        else:
            payload = tensor.to(device="cpu", dtype=torch.float32).contiguous().numpy().tobytes()
        if compressed:
            payload = compress(payload, _itemsize(tensor.shape, codec))
        for offset in range(0, max(1, len(payload)), CHUNK_BYTES):
            part = payload[offset : offset + CHUNK_BYTES]
            chunk = pb.UpdateChunk(window=window, name=name, shape=shape, offset=offset, payload=part)
            chunk.compressed = compressed
            if offset == 0:
                chunk.rows = rows
            yield chunk
    yield pb.UpdateChunk(window=window, last=True, weight=weight)


class UpdateAssembler:
    """Joins the chunks of one update into tensors of known shapes.

    Chunks of a tensor come in order. `codec` is the sender's; `who` begins every error message.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], who: str, codec: str = "fp32") -> None:
        self._shapes = shapes
        self._who = who
        self._codec = codec
        self._buffers: dict[str, bytearray] = {}
        self._compressed: set[str] = set()
        self._weight = 0.0
        self._rows: dict[str, Tensor] = {}
        """[R] bool of each matrix sent without all its rows: the rows that come."""

    def add(self, chunk: pb.UpdateChunk) -> ClientUpdate | None:
        """Keep a chunk; after the last one, the update."""
        return self.finish() if self.take(chunk) else None

    def take(self, chunk: pb.UpdateChunk) -> bool:
        """Keep a chunk's bytes; True for the last one. WireError on anything unexpected."""
        if chunk.last:
            # A count of tokens; NaN or infinity would spread to everybody's average.
            if not 0 <= chunk.weight <= LARGEST_WEIGHT:
                raise WireError(f"{self._who}: a weight of {chunk.weight}")
            for name, tensor_shape in self._shapes.items():
                buffer = self._buffers.get(name)
                is_plain = name not in self._compressed
                if buffer is None or (is_plain and len(buffer) != self._num_bytes(name, tensor_shape)):
                    raise WireError(f"{self._who}: tensor {name!r} did not arrive whole")
            self._weight = chunk.weight
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

    def finish(self) -> ClientUpdate:
        """The update, fp32, after its last chunk; WireError for values that are not sane."""
        tensors = {}
        for name, shape in self._shapes.items():
            sent = self._decode(name, self._sent_shape(name, shape), self._content(name, shape))
            rows = self._rows.pop(name, None)
            tensors[name] = sent if rows is None else torch.zeros(shape).index_put_((rows,), sent)
        return ClientUpdate(tensors, self._weight)

    def _content(self, name: str, shape: tuple[int, ...]) -> bytearray:
        """A tensor's bytes, decompressed if it was compressed."""
        buffer = self._buffers.pop(name)
        if name not in self._compressed:
            return buffer
        who = f"{self._who}: tensor {name!r}"
        return bytearray(decompress(bytes(buffer), self._num_bytes(name, shape), _itemsize(shape, self._codec), who))

    def _sent_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (int(self._rows[name].sum()), *shape[1:]) if name in self._rows else shape

    def _num_bytes(self, name: str, shape: tuple[int, ...]) -> int:
        shape = self._sent_shape(name, shape)
        if _is_coded(shape, self._codec):
            return sum(frame_bytes(shape[0], shape[1], self._codec))
        return 4 * torch.Size(shape).numel()

    def _decode(self, name: str, shape: tuple[int, ...], buffer: bytearray) -> Tensor:
        who = f"{self._who}: tensor {name!r}"
        if _is_coded(shape, self._codec):
            end, _ = frame_bytes(shape[0], shape[1], self._codec)
            parts = {"payload": bytes(buffer[:end]), "scales": bytes(buffer[end:])}
            return decode(pb.TensorFrame(codec=self._codec, shape=shape, **parts), shape, self._codec, who)
        values = torch.frombuffer(buffer, dtype=torch.float32).view(shape) if buffer else torch.zeros(shape)
        largest = float(values.abs().max()) if buffer else 0.0  # NaN if any value is
        if not largest <= LARGEST_VALUE:
            raise WireError(f"{who} holds {largest:.3g}; at most {LARGEST_VALUE:.0e} is sane")
        return values


def _is_coded(shape: Sequence[int], codec: str) -> bool:
    """Whether a tensor of this shape is coded, rather than fp32."""
    return codec != "fp32" and len(shape) == 2


def _itemsize(shape: Sequence[int], codec: str) -> int:
    """Bytes of one value; a codec with scales has codes of one byte."""
    return frame_dtypes(codec)[0].itemsize if _is_coded(shape, codec) else 4
