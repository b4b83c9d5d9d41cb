"""Tensors that wait in a temporary file: in memory only while they are used."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedbert_ds.errors import RunError
from fedbert_ds.wire.codecs import byte_view


class Shelf:
    """fp32 tensors of known shapes by name, each in its place in a file that ends with the shelf.

    `folder` is made if it is missing; None is the system's for temporary files. RunError if the
    file cannot be written.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], folder: Path | None = None) -> None:
        self._where = folder or Path(tempfile.gettempdir())
        self._shapes = dict(shapes)
        try:
            self._where.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._where, buffering=0)  # noqa: SIM115 (it ends with this object)
        except OSError as error:
            raise RunError(
                f"{self._where}: takes no temporary file ({error.strerror}); make it writable, or free space"
            ) from error
        self._places: dict[str, int] = {}
        end = 0
        for name, shape in self._shapes.items():
            self._places[name] = end
            end += 4 * math.prod(shape)
        self._names: set[str] = set()

    @property
    def is_empty(self) -> bool:
        """No tensor was put, or all were cleared."""
        return not self._names

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a copy of a tensor, on any device, in place of the last one of this name."""
        values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
        rest = byte_view(values)
        try:
            self._file.seek(self._places[name])
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise RunError(
                f"a temporary file in {self._where} cannot be written ({error.strerror}); free some space"
            ) from error
        self._names.add(name)

    def get(self, name: str) -> Tensor:
        """A copy of the tensor on the CPU; KeyError if none of this name was put."""
        if name not in self._names:
            raise KeyError(name)
        values = torch.empty(self._shapes[name])
        rest = byte_view(values)
        self._file.seek(self._places[name])
        while rest:
            rest = rest[self._file.readinto(rest) :]
        return values

    def put_all(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep these and no others."""
        self._names.clear()
        for name, tensor in tensors.items():
            self.put(name, tensor)

    def get_all(self) -> dict[str, Tensor]:
        """Copies of all tensors."""
        return {name: self.get(name) for name in self._shapes if name in self._names}
