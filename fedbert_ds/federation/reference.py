"""The reference client model as bytes: a safetensors file, for a client that begins and for a
checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedbert_ds.errors import WireError
from fedbert_ds.federation.client_update import CHUNK_BYTES
from fedbert_ds.federation.half_optimizer import OptimizerState
from fedbert_ds.wire import fedbert_pb2 as pb

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
    try:
        facts = json.loads(_header(data)["__metadata__"]["reference"])
        version, numbers, notes = int(facts["version"]), facts["numbers"], dict(facts["notes"])
        tensors = safetensors.torch.load(data)
        optimizer: OptimizerState = {name: dict(values) for name, values in numbers.items()}
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"no reference client model ({type(error).__name__}: {error})") from error
    weights: dict[str, Tensor] = {}
    for path, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise ValueError(f"{path!r} is not of finite fp32 numbers")
        kind, _, rest = path.partition("/")
        if kind == "weights":
            weights[rest] = tensor
        else:
            key, _, name = rest.partition("/")
            optimizer.setdefault(name, {})[key] = tensor
            if tuple(tensor.shape) not in ((), shapes.get(name)):
                raise ValueError(f"{path!r} has shape {list(tensor.shape)}")
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = {name for name, _ in found.items() ^ dict(shapes).items()} | (optimizer.keys() - shapes.keys())
    if wrong:
        raise ValueError(f"not the client model's tensors: {sorted(wrong)[0]!r} differs")
    return Reference(version, weights, optimizer), notes


def reference_chunks(data: bytes) -> Iterator[pb.ServerMessage]:
    """The bytes of a reference as messages of at most CHUNK_BYTES; the last one says so."""
    for start in range(0, len(data), CHUNK_BYTES):
        part = data[start : start + CHUNK_BYTES]
        yield pb.ServerMessage(reference=pb.ReferenceChunk(payload=part, last=start + CHUNK_BYTES >= len(data)))


class ReferenceAssembler:
    """Joins chunks of a reference; WireError for one that does not fit the client model."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = dict(shapes)
        self._parts: list[bytes] = []
        self._room = LARGEST_HEADER + 4 * TENSORS_PER_WEIGHT * sum(map(math.prod, shapes.values()))

    def add(self, chunk: pb.ReferenceChunk) -> Reference | None:
        """Keep a chunk; after the last one, the reference."""
        self._room -= len(chunk.payload)
        if self._room < 0:
            raise WireError("the server's reference client model is larger than the client model can be")
        self._parts.append(chunk.payload)
        if not chunk.last:
            return None
        data = b"".join(self._parts)
        self._parts.clear()
        try:
            return from_bytes(data, self._shapes)[0]
        except ValueError as error:
            raise WireError(f"the server's reference client model: {error}") from error


def _header(data: bytes) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    if size > LARGEST_HEADER:
        raise ValueError(f"a header of {size} bytes")
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    return header
