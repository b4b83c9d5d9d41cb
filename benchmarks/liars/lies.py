"""A client program that lies: what it would have sent, turned round and made larger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fedbert_ds.wire import fedbert_pb2 as pb

Lie = Callable[[np.ndarray], np.ndarray]

LIES: dict[str, Lie] = {
    "flip": lambda values: -10.0 * values,
    "noise": lambda values: np.random.default_rng(len(values)).normal(0.0, 1e3, len(values)).astype(np.float32),
}
"""What becomes of the numbers of a gradient or an update: legal ones, below the largest value."""


def lying(message: pb.ClientMessage, lie: Lie) -> pb.ClientMessage:
    """The message with the lie in place of its numbers, fp32, and with a reported loss of 0.

    Gradients of hidden states and client updates lie; activations and counts are true.
    """
    told = pb.ClientMessage()
    told.CopyFrom(message)
    match told.WhichOneof("body"):
        case "gradient":
            told.gradient.hidden.payload = _told(told.gradient.hidden.payload, lie)
            told.gradient.loss_sum = 0.0
        case "trained":
            told.trained.loss_sum = 0.0
        case "update" if not told.update.last:
            told.update.payload = _told(told.update.payload, lie)
    return told


def liar(trainer: Any, lie: Lie) -> Callable[..., Any]:
    """The client's `trainer`, its messages as lies."""

    def made(*arguments: Any) -> Any:
        *others, send, held_out = arguments
        return trainer(*others, lambda message: send(lying(message, lie)), held_out)

    return made


def _told(payload: bytes, lie: Lie) -> bytes:
    return lie(np.frombuffer(payload, np.float32)).astype(np.float32).tobytes()
