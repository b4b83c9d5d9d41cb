"""Stateless randomness: a seed depends on a purpose and numbers, never on earlier draws."""

from __future__ import annotations

import hashlib

import numpy as np


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed from `parts` alone, equal on every machine and in every process.

    The first part names the purpose, so two purposes never share numbers under one run seed. The
    seed is the head of SHA-256 over the parts.
    """
    return int.from_bytes(_digest(parts)[:8], "big") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """A fresh numpy generator from `parts` alone, as `stable_seed`."""
    return np.random.default_rng(int.from_bytes(_digest(parts), "big"))


def _digest(parts: tuple[int | str, ...]) -> bytes:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
