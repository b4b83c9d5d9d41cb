"""The reference client model as bytes: a safetensors file, for a client that begins and for a
checkpoint.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fedbert_ds.errors import WireError
from fedbert_ds.federation.client_update import CHUNK_BYTES
from fedbert_ds.federation.half_optimizer import OptimizerState
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import byte_view

LARGEST_HEADER = 1 << 24
"""Most bytes that names, shapes and numbers of a file may take."""
TENSORS_PER_WEIGHT = 4
"""Most tensors of a parameter's shape that a file may hold for it: itself and what optimizers keep.
"""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Reference:
    """The client model that all clients share."""

    version: int
    """Windows behind the weights."""
    weights: dict[str, Tensor]
    """fp32 by name."""
    optimizer: OptimizerState = field(default_factory=dict)
    """What the run file's optimizer or a server optimizer remembers.

    Empty before its first step, and where the reference becomes the mean.
    """


def to_bytes(reference: Reference, notes: Mapping[str, Any] | None = None) -> bytes:
    """A safetensors file; numbers, and `notes` as JSON, are in its header."""
    tensors = {f"weights/{name}": tensor for name, tensor in reference.weights.items()}
    numbers: dict[str, dict[str, int | float]] = {}
    for name, values in reference.optimizer.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{key}/{name}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    facts = {"version": reference.version, "numbers": numbers, "notes": dict(notes or {})}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(contiguous, {"reference": json.dumps(facts)})


def from_bytes(data: bytes, shapes: Shapes) -> tuple[Reference, dict[str, Any]]:
    """The reference in `to_bytes`' result, and its notes.

    Raises ValueError for anything else than the weights of these shapes, fp32, with what an
    optimizer may keep of them.
    """
    arriving = _ArrivingReference(shapes)
    arriving.add(data)
    return arriving.finish()


def reference_chunks(data: bytes) -> Iterator[pb.ServerMessage]:
    """The bytes of a reference as messages of at most CHUNK_BYTES; the last one says so."""
    for start in range(0, len(data), CHUNK_BYTES):
        part = data[start : start + CHUNK_BYTES]
        yield pb.ServerMessage(reference=pb.ReferenceChunk(payload=part, last=start + CHUNK_BYTES >= len(data)))


class ReferenceAssembler:
    """Joins chunks of a reference; WireError for one that does not fit the client model."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = dict(shapes)
        self._arriving = _ArrivingReference(self._shapes)

    def add(self, chunk: pb.ReferenceChunk) -> Reference | None:
        """Keep a chunk; after the last one, the reference."""
        try:
            self._arriving.add(chunk.payload)
            if not chunk.last:
                return None
            arrived, self._arriving = self._arriving, _ArrivingReference(self._shapes)
            return arrived.finish()[0]
        except ValueError as error:
            raise WireError(f"the server's reference client model: {error}") from error


class _ArrivingReference:
    """A reference whose file comes in parts, of any size: each tensor is filled as its bytes come.

    So it is in memory once, where a library would hold the file and then the tensors. Sizes are
    checked before memory is allocated.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._beginning = bytearray()
        """Length and header, until the header is there."""
        self._version = 0
        self._notes: dict[str, Any] = {}
        self._weights: dict[str, Tensor] = {}
        self._optimizer: OptimizerState = {}
        self._places: deque[memoryview] | None = None
        """Where bytes to come belong, in their order; None before the header."""

    def add(self, part: bytes) -> None:
        """Take the next bytes of the file; ValueError for any that do not fit."""
        rest = memoryview(part)
        if self._places is None:
            self._beginning += part
            end = _header_end(self._beginning)
            if end is None or len(self._beginning) < end:
                return
            self._places = deque(self._open(self._beginning[8:end]))
            rest = memoryview(self._beginning)[end:]
        while rest:
            if not self._places:
                raise ValueError("it is larger than the client model can be")
            place = self._places.popleft()
            size = min(len(place), len(rest))
            place[:size] = rest[:size]
            rest = rest[size:]
            if size < len(place):
                self._places.appendleft(place[size:])

    def finish(self) -> tuple[Reference, dict[str, Any]]:
        """The reference and its notes, after the last bytes; ValueError if it is not whole."""
        if self._places is None or self._places:
            raise ValueError("no reference client model: it ends too early")
        missing = self._shapes.keys() - self._weights.keys()
        if missing:
            raise ValueError(f"not the client model's tensors: {min(missing)!r} is missing")
        kept = [value for values in self._optimizer.values() for value in values.values()]
        for tensor in (*self._weights.values(), *(value for value in kept if isinstance(value, Tensor))):
            if not all(math.isfinite(bound) for bound in (float(tensor.min()), float(tensor.max()))):
                raise ValueError("a tensor is not of finite numbers")
        return Reference(self._version, self._weights, self._optimizer), self._notes

    def _open(self, header: bytearray) -> Iterator[memoryview]:
        """Read the header and make its tensors; yields the bytes of each, in the file's order."""
        try:
            entries = json.loads(header)
            facts = json.loads(entries.pop("__metadata__")["reference"])
            self._version, self._notes = int(facts["version"]), dict(facts["notes"])
            self._optimizer = {name: dict(values) for name, values in facts["numbers"].items()}
            in_order = sorted((tuple(entry["data_offsets"]), path, entry) for path, entry in entries.items())
            sizes = [(path, entry["dtype"], tuple(map(int, entry["shape"]))) for _, path, entry in in_order]
            bounds = [(int(begin), int(end)) for (begin, end), _, _ in in_order]
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"no reference client model ({type(error).__name__}: {error})") from error
        most, end_before = TENSORS_PER_WEIGHT * sum(map(math.prod, self._shapes.values())), 0
        for (path, dtype, shape), (begin, end) in zip(sizes, bounds, strict=True):
            kind, _, rest = path.partition("/")
            key, _, name = rest.partition("/") if kind == "optimizer" else ("", "", rest)
            shapes = {self._shapes.get(name), ()} if kind == "optimizer" else {self._shapes.get(name)}
            if kind not in ("weights", "optimizer") or name not in self._shapes or shape not in shapes:
                raise ValueError(f"not the client model's tensors: {path!r} of shape {list(shape)}")
            if dtype != "F32" or begin != end_before or end != begin + 4 * math.prod(shape):
                raise ValueError(f"{path!r} is not of fp32 numbers, one tensor after another")
            if end > 4 * most:
                raise ValueError("it is larger than the client model can be")
            end_before = end
            tensor = torch.empty(shape)
            if kind == "optimizer":
                self._optimizer.setdefault(name, {})[key] = tensor
            else:
                self._weights[name] = tensor
            yield byte_view(tensor)
        if unknown := self._optimizer.keys() - self._shapes.keys():
            raise ValueError(f"not the client model's tensors: {min(unknown)!r}")


def _header_end(beginning: bytearray) -> int | None:
    """Where a file's header ends; None while its length is not there."""
    if len(beginning) < 8:
        return None
    size = int.from_bytes(beginning[:8], "little")
    if size > LARGEST_HEADER:
        raise ValueError(f"it is larger than the client model can be: a header of {size} bytes")
    return 8 + size
