"""Stateless randomness: a generator that follows from a purpose and numbers, never from what was drawn before."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(*parts: int | str) -> np.random.Generator:
    """A fresh numpy generator that depends on `parts` alone, equal on every machine.

    The first part names the purpose, so that one seed never gives two purposes the same numbers.
    """
    text = "\0".join(str(part) for part in parts)
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest(), "big"))
