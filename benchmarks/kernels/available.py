"""What a baseline needs to run at all; Unavailable says which of it is missing."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from fedbert_ds.bench.kernels.problem import Unavailable


def needs_gpu(device: torch.device) -> None:
    """Unavailable on a CPU."""
    if device.type != "cuda":
        raise Unavailable("needs a GPU")


def installed(module: str, name: str) -> Any:
    """What a package that may be missing calls `name`; Unavailable without it."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        raise Unavailable("not installed") from None


def needs_no_dropout(dropout: float) -> None:
    """Unavailable with dropout."""
    if dropout:
        raise Unavailable("has no dropout")
