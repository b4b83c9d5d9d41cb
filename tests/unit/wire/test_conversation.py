"""Conversations that lose their connections anywhere: every message comes once and in order, both
ways.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.errors import WireError
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.conversation import ACKNOWLEDGE_BYTES, MESSAGE_BYTES, Conversation


def body(number: int) -> bytes:
    message: bytes = pb.ClientMessage(
        manifest=pb.Manifest(window=number, lengths=[1] * (number % 5))
    ).SerializeToString()
    return message


@dataclass
class End:
    """A conversation, what was put into it, what came out, and the bytes on their way to it."""

    conversation: Conversation = field(default_factory=Conversation)
    put: int = 0
    came: list[int] = field(default_factory=list)
    on_the_way: list[bytes] = field(default_factory=list)

    def say(self) -> None:
        self.put += 1
        self.conversation.put(body(self.put))

    def hear(self) -> None:
        message = pb.ClientMessage.FromString(self.on_the_way.pop(0))
        if self.conversation.take(message.delivery, 10):
            self.came.append(message.manifest.window)


def transmit(sender: End, receiver: End, acknowledge: bool = False) -> bool:
    frame = sender.conversation.frame(acknowledge)
    if frame is not None:
        receiver.on_the_way.append(frame)
    return frame is not None


def reconnect(ends: tuple[End, End]) -> None:
    """What is on its way is lost; client attaches with what it has, then server answers with what
    it has.
    """
    client, server = ends
    client.on_the_way.clear()
    server.on_the_way.clear()
    server.conversation.resume(client.conversation.received)
    greeting = pb.ServerMessage.FromString(server.conversation.greeting()).delivery
    client.conversation.resume(greeting.received)
    assert not client.conversation.take(greeting, 0)


EVENTS = st.lists(
    st.tuples(st.sampled_from(["say", "transmit", "acknowledge", "hear", "reconnect"]), st.integers(0, 1)), max_size=150
)


@given(EVENTS)
def test_every_message_comes_once_and_in_order_whatever_is_lost(events: list[tuple[str, int]]) -> None:
    ends = End(), End()
    for event, who in events:
        mine, other = ends[who], ends[1 - who]
        match event:
            case "say":
                mine.say()
            case "transmit" | "acknowledge":
                transmit(mine, other, acknowledge=event == "acknowledge")
            case "hear" if mine.on_the_way:
                mine.hear()
            case "reconnect":
                reconnect(ends)
        assert mine.came == list(range(1, len(mine.came) + 1)) and len(mine.came) <= other.put
    reconnect(ends)
    moved = True
    while moved:
        moved = False
        for mine, other in (ends, ends[::-1]):
            while transmit(mine, other, acknowledge=True):
                moved = True
            while other.on_the_way:
                other.hear()
    for mine, other in (ends, ends[::-1]):
        assert mine.came == list(range(1, other.put + 1))
        assert other.conversation.is_idle and other.conversation.kept_bytes == 0
        assert not mine.conversation.is_untold


def test_what_is_kept_is_what_has_not_been_acknowledged() -> None:
    sender, receiver = End(), End()
    large = pb.ClientMessage(update=pb.UpdateChunk(payload=bytes(ACKNOWLEDGE_BYTES // 2))).SerializeToString()
    for message in (large, b"", large):
        sender.conversation.put(message)
    assert sender.conversation.kept_bytes == 2 * len(large) + MESSAGE_BYTES
    for number in range(3):
        frame = sender.conversation.frame()
        assert frame is not None
        assert receiver.conversation.take(pb.ClientMessage.FromString(frame).delivery, len(frame))
        assert (receiver.conversation.frame() is not None) == (number == 2), "told at once after ACKNOWLEDGE_BYTES"
    assert not receiver.conversation.is_untold
    sender.conversation.acknowledge(2)
    assert sender.conversation.kept_bytes == len(large) and not sender.conversation.is_idle
    sender.conversation.resume(2)
    assert sender.conversation.resent_bytes == len(large)
    assert sender.conversation.frame() == frame
    assert not receiver.conversation.take(pb.ClientMessage.FromString(frame).delivery, len(frame)), "came before"


def delivery(sequence: int, received: int = 0) -> pb.Delivery:
    return pb.Delivery(sequence=sequence, received=received)


def test_what_cannot_be_is_an_error() -> None:
    conversation = Conversation()
    with pytest.raises(WireError, match="message 2 came after message 0"):
        conversation.take(delivery(2), 0)
    with pytest.raises(WireError, match="message 1 was acknowledged, 0 were sent"):
        conversation.take(delivery(0, 1), 0)
    conversation.put(b"")
    with pytest.raises(WireError, match="message 1 was acknowledged, 0 were sent"):
        conversation.acknowledge(1)
    conversation.frame()
    conversation.acknowledge(1)
    with pytest.raises(WireError, match="0 messages were received, 1 had been acknowledged"):
        conversation.resume(0)
