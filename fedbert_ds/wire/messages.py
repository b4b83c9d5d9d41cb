"""The wire contract as typed, checked data, shared by both sides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fedbert_ds.config import Cut, FederationSection, OptimizerSection, Section, WireSection
from fedbert_ds.errors import WireError
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import LARGEST_VALUE, decode, encode, frame_bytes, frame_dtypes
from fedbert_ds.wire.compression import compress, decompress, largest_frame

PROTOCOL = 3
"""Raised when a message changes its meaning; client and server must have the same."""

CHUNK_BYTES = 1 << 20

LARGEST_WEIGHT = 2.0**53
"""Largest count of tokens that a double keeps exactly."""


class ClientSettings(Section):
    """What the server tells every client of the run, in `Welcome.settings`."""

    seed: int
    windows: int
    tokens: int
    """Tokens this client brings to a window."""
    sequence_length: int
    mask_probability: float
    whole_word: bool
    optimizer: OptimizerSection
    federation: FederationSection
    wire: WireSection


def parse_settings(text: str) -> ClientSettings:
    """Settings from a Welcome; WireError when they are not what this version knows."""
    try:
        return ClientSettings.model_validate_json(text)
    except ValidationError as error:
        raise WireError(f"the server's settings are not understood: {error.errors()[0]['msg']}") from error


def cut_to_json(cut: Cut) -> str:
    """The run file's `cut` as JSON, for a Welcome."""
    return TypeAdapter(Cut).dump_json(cut).decode()


def parse_cut(text: str) -> Cut:
    """The `cut` of a Welcome; WireError when it is not one this version knows."""
    try:
        return TypeAdapter(Cut).validate_json(text)
    except ValidationError as error:
        raise WireError(f"the server's cut {text} is not understood; install the same fedbert-ds on both") from error


@dataclass(frozen=True)
class Manifest:
    """Sizes a client brings to one window: tokens and masked tokens of each sequence."""

    client: str
    window: int
    lengths: tuple[int, ...]
    masked: tuple[int, ...]


def checked_manifest(client: str, message: pb.Manifest, max_sequence: int, max_tokens: int) -> Manifest:
    """The manifest in a message; WireError when sizes are impossible.

    `max_sequence` is the longest sequence the position table holds, `max_tokens` what this client was told to bring.
    """
    who = f"client {client}: manifest of window {message.window}"
    # One sequence may overshoot the share: a client always brings at least one.
    limit = max(max_tokens, max_sequence)
    count = len(message.lengths)
    if not 0 < count <= limit or count != len(message.masked):
        raise WireError(f"{who}: {count} lengths and {len(message.masked)} masked counts for {limit} tokens")
    lengths, masked = tuple(message.lengths), tuple(message.masked)
    if min(lengths) < 1:
        raise WireError(f"{who}: a sequence without tokens")
    if max(lengths) > max_sequence:
        raise WireError(f"{who}: a sequence of {max(lengths)} tokens; the position table holds {max_sequence}")
    if any(wanted > length for wanted, length in zip(masked, lengths, strict=True)):
        raise WireError(f"{who}: more masked tokens than tokens")
    if sum(lengths) > limit:
        raise WireError(f"{who}: {sum(lengths)} tokens instead of at most {limit}")
    return Manifest(client, message.window, lengths, masked)


def update_chunks(
    window: int,
    tensors: Iterable[tuple[str, Tensor]],
    weight: float,
    codec: str = "fp32",
    *,
    compressed: bool = False,
) -> Iterator[pb.UpdateChunk]:
    """A client half (or its gradients) as chunks of at most 1 MB, the last one marked.

    Matrices are coded, payload and then scales; everything else is fp32. Rows of zeros, of words that nobody touched,
    are named and not sent. With `compressed` each tensor is a zstd frame, which is then cut into chunks.
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
    """Joins chunks into named tensors of known shapes; chunks come in order, as one stream delivers them.

    `codec` is what `update_chunks` was given.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], who: str, codec: str = "fp32") -> None:
        self._shapes = shapes
        self._who = who
        self._codec = codec
        self._buffers: dict[str, bytearray] = {}
        self._compressed: set[str] = set()
        self._weight = 0.0
        self._rows: dict[str, Tensor] = {}
        """Of matrices that came without all their rows: [R] bool, which came."""

    def add(self, chunk: pb.UpdateChunk) -> tuple[dict[str, Tensor], float] | None:
        """`take` a chunk; the last one returns what `finish` does."""
        return self.finish() if self.take(chunk) else None

    def take(self, chunk: pb.UpdateChunk) -> bool:
        """Keep a chunk's bytes; whether it was the last one. WireError on anything unexpected."""
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

    def finish(self) -> tuple[dict[str, Tensor], float]:
        """After the last chunk: all tensors (fp32) and their weight. WireError when not all of them are sound."""
        tensors = {}
        for name, shape in self._shapes.items():
            came = self._decode(name, self._shape_that_came(name, shape), self._content(name, shape))
            rows = self._rows.pop(name, None)
            tensors[name] = came if rows is None else torch.zeros(shape).index_put_((rows,), came)
        return tensors, self._weight

    def _content(self, name: str, shape: tuple[int, ...]) -> bytearray:
        """A tensor's bytes as they were before they were compressed, if they were."""
        buffer = self._buffers.pop(name)
        if name not in self._compressed:
            return buffer
        who = f"{self._who}: tensor {name!r}"
        return bytearray(decompress(bytes(buffer), self._num_bytes(name, shape), _itemsize(shape, self._codec), who))

    def _shape_that_came(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (int(self._rows[name].sum()), *shape[1:]) if name in self._rows else shape

    def _num_bytes(self, name: str, shape: tuple[int, ...]) -> int:
        shape = self._shape_that_came(name, shape)
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
    """A tensor of a half is coded, rather than fp32."""
    return codec != "fp32" and len(shape) == 2


def _itemsize(shape: Sequence[int], codec: str) -> int:
    """Bytes of a value of such a tensor; a codec that has scales, which come last, has codes of one byte."""
    return frame_dtypes(codec)[0].itemsize if _is_coded(shape, codec) else 4
