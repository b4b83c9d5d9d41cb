"""Stateless randomness: a seed follows from a purpose and numbers, never from what was drawn before."""

from __future__ import annotations

import hashlib


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on `parts` alone, equal on every machine and in every process.

    The first part names the purpose, so that one run seed never gives two purposes the same numbers.
    """
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
