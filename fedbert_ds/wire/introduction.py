"""How a caller says who it is: in the metadata of its call, before any message.

gRPC takes a message into memory as a whole before anybody can look at it, up to 4 GB of it, also
where it is told to refuse more than some length. Metadata it refuses beyond a few kB. So a server
reads no message of a caller that it does not know.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from fedbert_ds.errors import WireError
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.channel import JOIN, OPEN

KEY = "introduction-bin"
"""Metadata whose name ends so is bytes."""

M = TypeVar("M", bound=Message)


def introduced(message: Message) -> list[tuple[str, bytes]]:
    """The metadata of a call that begins with this message: a Hello, an Attach or an OpenRun."""
    return [(KEY, message.SerializeToString())]


def introduction(metadata: Iterable[tuple[str, Any]] | None, kind: type[M]) -> M:
    """What the caller said, a message of this kind; WireError where it said nothing of it."""
    try:
        return kind.FromString(next(value for key, value in metadata or () if key == KEY))
    except (DecodeError, TypeError, StopIteration):
        raise WireError("the caller does not say who it is; install the same fedbert-ds on both sides") from None


def join(channel: grpc.Channel, hello: pb.Hello, timeout: float) -> Any:
    """A future of the server's Welcome; it raises grpc.RpcError with the reason of a refusal."""
    call = channel.unary_unary(JOIN, response_deserializer=pb.Welcome.FromString)
    return call.future(b"", metadata=introduced(hello), timeout=timeout)


def open_run(channel: grpc.Channel, request: pb.OpenRun, timeout: float) -> Any:
    """A future of the aggregator's Opened; it raises as that of `join`."""
    call = channel.unary_unary(OPEN, response_deserializer=pb.Opened.FromString)
    return call.future(b"", metadata=introduced(request), timeout=timeout)
