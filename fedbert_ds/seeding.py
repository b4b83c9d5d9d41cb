"""Stateless randomness: a seed follows from a purpose and numbers, never from what was drawn before."""

from __future__ import annotations

import hashlib

import numpy as np


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on `parts` alone, equal on every machine and in every process.

    The first part names the purpose, so that one run seed never gives two purposes the same numbers.
    """
    return int.from_bytes(_digest(parts)[:8], "big") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """A fresh numpy generator that depends on `parts` alone, as `stable_seed` does."""
    return np.random.default_rng(int.from_bytes(_digest(parts), "big"))


def _digest(parts: tuple[int | str, ...]) -> bytes:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
