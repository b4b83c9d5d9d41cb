"""Whole numbers in place of tensors: what clients and the body compute from each sequence.

All sums are exact, in any order. Every number depends on the ones before it, so a step with
another sum, or a client model of another version, changes all that follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple
from zlib import crc32

import numpy as np

PRIME = 1021
"""Small enough that a run's sums are whole numbers of fp32."""
LONGEST = 8
"""Tokens of a sequence."""


class Text(NamedTuple):
    """One sequence."""

    number: int
    length: int
    masked: int


@lru_cache(maxsize=1 << 14)
def text(client: str, place: int) -> Text:
    """A client's sequence at this place of its text."""
    drawn = crc32(f"{client} {place}".encode())
    length = 1 + drawn % LONGEST
    return Text(drawn // 64 % PRIME, length, drawn // 16 % (length + 1))


def batch(client: str, first: int, tokens: int) -> range:
    """The places of a window's sequences: as many as fit the client's tokens, at least one."""
    last, left = first, tokens
    while last == first or text(client, last).length <= left:
        left -= text(client, last).length
        last += 1
    return range(first, last)


def activation(number: int, half: float) -> int:
    """What a client sends of a sequence."""
    return (31 * number + int(half)) % PRIME


def hidden(activated: int, body: int) -> int:
    """What the body makes of it."""
    return (17 * activated + body) % PRIME


def gradient(number: int, half: float, state: int, all_masked: int) -> int:
    """What the client answers."""
    return (13 * state + number + int(half) + all_masked) % PRIME


def loss(state: int, masked: int) -> float:
    """The loss that it reports."""
    return float(state % 7 * masked)


def input_gradient(answered: int, activated: int, body: int) -> int:
    """What the body sends back."""
    return (7 * answered + activated + body) % PRIME


def of_body(answered: int, activated: int) -> int:
    """A sequence's part of the body's gradient."""
    return (3 * answered + activated) % PRIME


def of_half(answered: int, returned: int) -> int:
    """A sequence's part of the client model's gradient."""
    return (5 * answered + returned) % PRIME


def alone(number: int, half: float) -> int:
    """A sequence's part of the gradient where a client holds the whole model."""
    return (31 * number + int(half)) % PRIME


def stepped_body(body: int, total: int) -> int:
    """The body after a step with the sum of all gradients."""
    return (body * 1_000_003 + total) % (2**61 - 1)


def fp32(value: float) -> float:
    """Rounded as tensors are."""
    return float(np.float32(value))


def stepped_half(half: float, total: int) -> float:
    """A client model after a step with its gradient, at a learning rate of 1."""
    return float(np.float32(half) - np.float32(total))


def packed(numbers: Iterable[int]) -> bytes:
    """Numbers as a message carries them."""
    return np.fromiter(numbers, np.int64).tobytes()


def unpacked(payload: bytes) -> Sequence[int]:
    """The numbers of a message."""
    values: list[int] = np.frombuffer(payload, np.int64).tolist()
    return values
