"""The outbox: order, encoding in a thread, bytes by kind, and errors of the thread."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from fedbert_ds.errors import NotFinite, WireError
from fedbert_ds.server.network.outbox import Outbox
from fedbert_ds.wire import fedbert_pb2 as pb


class Endpoint:
    """Records messages, and the threads that sent them."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.threads: set[str] = set()
        self.bytes_down = 0

    def send(self, client: str, message: pb.ServerMessage) -> None:
        self.threads.add(threading.current_thread().name)
        self.sent.append((client, message.WhichOneof("body")))
        self.bytes_down += message.ByteSize()

    def close(self, client: str, last: pb.ServerMessage) -> None:
        self.sent.append((client, f"close {last.WhichOneof('body')}"))

    def take_bytes(self) -> tuple[int, int]:
        taken, self.bytes_down = self.bytes_down, 0
        return 7, taken


OPEN = pb.ServerMessage(open=pb.Open(window=1))
UPDATE = pb.ServerMessage(update=pb.UpdateChunk(payload=bytes(1000)))


def outbox_and_endpoint(threads: int = 1) -> tuple[Outbox, Any]:
    endpoint = Endpoint()
    return Outbox(endpoint, threads), endpoint  # type: ignore[arg-type]


def test_messages_leave_in_order_and_are_encoded_in_the_thread() -> None:
    outbox, endpoint = outbox_and_endpoint()
    let_go = threading.Event()

    def slow() -> list[pb.ServerMessage]:
        assert let_go.wait(20.0)
        return [pb.ServerMessage(hidden=pb.Hidden(window=1))]

    outbox.send_coded(["ada"], slow)
    outbox.send("ada", OPEN)
    outbox.close("ada", pb.ServerMessage(finish=pb.Finish()))
    assert endpoint.sent == []
    let_go.set()
    outbox.settle()
    assert endpoint.sent == [("ada", "hidden"), ("ada", "open"), ("ada", "close finish")]
    assert threading.current_thread().name not in endpoint.threads


def test_threads_frame_beside_each_other_and_messages_leave_in_order() -> None:
    """The first framing ends last: it waits until the third has begun."""
    outbox, endpoint = outbox_and_endpoint(threads=2)
    last_began = threading.Event()

    def first() -> pb.ServerMessage:
        assert last_began.wait(20.0)
        return pb.ServerMessage(hidden=pb.Hidden())

    def last() -> pb.ServerMessage:
        last_began.set()
        return pb.ServerMessage(input_gradient=pb.InputGradient())

    outbox.send_framed("ada", first)
    outbox.send_framed("bo", lambda: OPEN)
    outbox.send("ada", OPEN)
    outbox.send_framed("ada", last)
    outbox.close("ada", pb.ServerMessage(finish=pb.Finish()))
    outbox.settle()
    assert endpoint.sent == [
        ("ada", "hidden"), ("bo", "open"), ("ada", "open"), ("ada", "input_gradient"), ("ada", "close finish")
    ]  # fmt: skip


def test_bytes_of_client_updates_are_counted_apart_and_once() -> None:
    outbox, _ = outbox_and_endpoint()
    outbox.send("ada", OPEN)
    outbox.send_coded(["ada", "bo"], lambda: [UPDATE, UPDATE])
    held_out = pb.ServerMessage(hidden=pb.Hidden(window=1, held_out=True))
    outbox.send_framed("bo", lambda: held_out)
    outbox.settle()
    updates = 4 * UPDATE.ByteSize()
    assert outbox.take_bytes() == (7, updates + OPEN.ByteSize() + held_out.ByteSize(), updates, held_out.ByteSize())
    assert outbox.take_bytes() == (7, 0, 0, 0)


def test_what_is_not_finite_is_not_sent_and_told_and_others_go_on() -> None:
    outbox, endpoint = outbox_and_endpoint()

    def fails() -> Any:
        raise NotFinite("an activation or gradient is not finite")

    outbox.send_framed("ada", fails)
    outbox.send_framed("bo", lambda: OPEN)
    outbox.settle()
    assert [client for client, _ in endpoint.sent] == ["bo"]
    ((client, error),) = outbox.take_unsound()
    assert client == "ada" and isinstance(error, NotFinite) and outbox.take_unsound() == []


@pytest.mark.parametrize("kind", ["coded", "framed"])
def test_an_error_in_the_thread_is_raised_by_the_next_call(kind: str) -> None:
    outbox, endpoint = outbox_and_endpoint()

    let_go = threading.Event()

    def fails() -> Any:
        assert let_go.wait(20.0)
        raise WireError("not finite")

    outbox.check()
    if kind == "coded":
        outbox.send_coded(["ada"], fails)
    else:
        outbox.send_framed("ada", fails)
    let_go.set()
    with pytest.raises(WireError, match="not finite"):
        outbox.settle()
    for call in (outbox.check, lambda: outbox.send("ada", OPEN)):
        with pytest.raises(WireError, match="not finite"):
            call()
    assert endpoint.sent == []
