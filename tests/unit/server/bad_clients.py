"""Three clients, one of them perhaps bad: every way to be bad, and the reason of its refusal."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from unit.server.fake_client import WIDTH, Alter, FakeClient

from fedbert_ds.config import RunConfig
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import encode

SOME = {"minimum": 1}


def trio(config: RunConfig, alter: Alter | None = None) -> list[FakeClient]:
    """ada and cy are honest and share micro-batches with bo, whom `alter` may spoil."""
    ada, cy = FakeClient("ada", config, (3, 5, 2, 4)), FakeClient("cy", config, (2, 2, 8, 1))
    return [ada, FakeClient("bo", config, (4, 3, 3, 2), *([alter] if alter else [])), cy]


def larger(kind: str, times: float) -> Alter:
    """A client whose numbers of this kind are so many times what it should send; they are legal."""

    def alter(number: int, message: pb.ClientMessage) -> list[pb.ClientMessage]:
        if message.WhichOneof("body") == kind:
            frame = message.gradient.hidden if kind == "gradient" else message.activations.values
            frame.payload = (times * np.frombuffer(frame.payload, np.float32)).astype(np.float32).tobytes()
        return [message]

    return alter


def instead(kind: str, change: Any, which: int = 0) -> Alter:
    """Spoil the which-th message of a kind."""
    seen = [0]

    def alter(number: int, message: pb.ClientMessage) -> list[pb.ClientMessage]:
        if message.WhichOneof("body") != kind:
            return [message]
        seen[0] += 1
        return change(message) if seen[0] == which + 1 else [message]

    return alter


def with_frame(kind: str, field: str, **changes: Any) -> Alter:
    def change(message: pb.ClientMessage) -> list[pb.ClientMessage]:
        frame = getattr(getattr(message, kind), field)
        for name, value in changes.items():
            if name == "shape":
                frame.ClearField("shape")
                frame.shape.extend(value)
            elif name == "first":
                frame.payload = struct.pack("<f", value) + frame.payload[4:]
            else:
                setattr(frame, name, value)
        return [message]

    return instead(kind, change)


def with_field(kind: str, name: str, value: Any) -> Alter:
    def change(message: pb.ClientMessage) -> list[pb.ClientMessage]:
        body = getattr(message, kind)
        body.ClearField(name)
        if isinstance(value, list):
            getattr(body, name).extend(value)
        else:
            setattr(body, name, value)
        return [message]

    return instead(kind, change)


def beside(kind: str, *others: pb.ClientMessage) -> Alter:
    return instead(kind, lambda message: [*others, message])


def twice(kind: str) -> Alter:
    return instead(kind, lambda message: [message, message])


GRADIENT_TOO_EARLY = pb.ClientMessage(
    gradient=pb.Gradient(window=0, micro_batch=1, hidden=encode(torch.zeros(1, WIDTH), "fp32"))
)

BAD: dict[str, tuple[Callable[[], Alter], str]] = {
    "activations of another shape": (
        lambda: with_frame("activations", "values", shape=[3, WIDTH]),
        "shape [3, 4] instead of",
    ),
    "activations of another width": (
        lambda: with_frame("activations", "values", shape=[4, 5]),
        "shape [4, 5] instead of",
    ),
    "activations cut short": (lambda: with_frame("activations", "values", payload=b"xxxx"), "4 bytes instead of"),
    "activations in another codec": (
        lambda: with_frame("activations", "values", codec="int8"),
        "codec 'int8' instead of",
    ),
    "activations that are not finite": (lambda: with_frame("activations", "values", first=math.nan), "not finite"),
    "activations out of all measure": (lambda: with_frame("activations", "values", first=1e9), "a value of 1e+09"),
    "activations of another window": (lambda: with_field("activations", "window", 1), "of window 1 instead of 0"),
    "gradient of another window": (lambda: with_field("gradient", "window", 1), "of window 1 instead of 0"),
    "activations twice": (lambda: twice("activations"), "which nobody asked for"),
    "activations of no micro-batch": (lambda: with_field("activations", "micro_batch", 77), "which nobody asked for"),
    "positions out of range": (lambda: with_field("activations", "masked_positions", bytes([255])), "masked positions"),
    "gradient that is not finite": (lambda: with_frame("gradient", "hidden", first=-math.inf), "not finite"),
    "gradient out of all measure": (lambda: with_frame("gradient", "hidden", first=-1e9), "a value of 1e+09"),
    "gradient of another shape": (lambda: with_frame("gradient", "hidden", shape=[1]), "shape [1] instead of"),
    "gradient twice": (lambda: twice("gradient"), "which nobody asked for"),
    "gradient before hidden states": (lambda: beside("activations", GRADIENT_TOO_EARLY), "which nobody asked for"),
    "a loss that is no number": (lambda: with_field("gradient", "loss_sum", math.nan), "a loss of nan"),
    "a loss below zero": (lambda: with_field("gradient", "loss_sum", -1.0), "a loss of -1 for"),
    "an infinite loss": (lambda: with_field("gradient", "loss_sum", math.inf), "a loss of inf"),
    "manifest twice": (lambda: twice("manifest"), "a second manifest of window 0"),
    "manifest of another window": (lambda: with_field("manifest", "window", 1), "manifest of window 1 instead of 0"),
    "manifest above its share": (
        lambda: with_field("manifest", "lengths", [8, 8, 8, 8]),
        "32 tokens instead of at most 12",
    ),
    "manifest of nothing": (lambda: with_field("manifest", "lengths", []), "0 lengths"),
    "manifest of a long sequence": (lambda: with_field("manifest", "lengths", [9, 1, 1, 1]), "a sequence of 9 tokens"),
    "half of another name": (lambda: with_field("update", "name", "tables"), "tensor 'tables' of shape"),
    "half of another shape": (lambda: with_field("update", "shape", [4, 3]), "tensor 'table' of shape [4, 3]"),
    "half that is not finite": (
        lambda: with_field("update", "payload", struct.pack("<12f", *[math.nan] * 12)),
        "holds nan",
    ),
    "half before it is asked for": (
        lambda: beside("manifest", pb.ClientMessage(update=pb.UpdateChunk(last=True))),
        "an update of window 0, which nobody asked for",
    ),
    "half without end": (
        lambda: beside("update", pb.ClientMessage(update=pb.UpdateChunk(last=True))),
        "not arrive whole",
    ),
    "saved without being asked": (
        lambda: beside("gradient", pb.ClientMessage(saved=pb.Saved(window=0))),
        "not asked to save",
    ),
}


def with_rows(num_rows: int, index: bytes | None = None) -> Alter:
    """Another number of distinct rows than there are, or another row index."""

    def change(message: pb.ClientMessage) -> list[pb.ClientMessage]:
        activations = message.activations
        activations.values.CopyFrom(encode(torch.zeros(num_rows, WIDTH), "fp32"))
        if index is not None:
            activations.row_index = index
        return [message]

    return instead("activations", change)


BAD_ROWS: dict[str, tuple[Callable[[], Alter], str]] = {
    "no rows": (lambda: with_rows(0), "0 rows for 7 tokens"),
    "more rows than tokens": (lambda: with_rows(8), "8 rows for 7 tokens"),
    "rows without a shape": (lambda: with_frame("activations", "values", shape=[]), "0 rows for 7 tokens"),
    "an index below no row": (lambda: with_rows(3, bytes([255] * 2)), "a row number is not below 3"),
    "an index of another length": (lambda: with_rows(3, bytes(3)), "3 bytes of row numbers instead of 2"),
    "no index": (lambda: with_rows(3, b""), "0 bytes of row numbers instead of 2"),
    "rows of another width": (
        lambda: with_frame("activations", "values", shape=[4, WIDTH + 1]),
        "shape [4, 5] instead of [4, 4]",
    ),
}
