"""Traffic: a message is serialized once for all its receivers, and counted for each."""

from __future__ import annotations

from fedbert_ds.server.network.traffic import Traffic
from fedbert_ds.wire import fedbert_pb2 as pb


def update(size: int) -> pb.ServerMessage:
    return pb.ServerMessage(update=pb.UpdateChunk(payload=bytes(size)))


def test_receivers_in_a_row_get_the_same_bytes() -> None:
    traffic, message, other = Traffic(), update(1000), update(1000)
    first = traffic.serialize(message)
    assert first == message.SerializeToString()
    assert traffic.serialize(message) is first
    assert traffic.serialize(other) is not first and traffic.serialize(other) == first


def test_bytes_are_counted_for_each_receiver_and_taken_once() -> None:
    traffic, message = Traffic(), update(1000)
    assert traffic.take() == (0, 0)
    for _ in range(3):
        traffic.serialize(message)
    traffic.count_up(7)
    assert traffic.take() == (7, 3 * message.ByteSize())
    traffic.count_up(5)
    assert traffic.take() == (5, 0)
