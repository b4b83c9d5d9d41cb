"""A client's stream without a network: frames in, frames out, and what ends it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from unit.server.network.loopback import manifest, save

from fedbert_ds.server.network import client_stream
from fedbert_ds.server.network.client_stream import ClientStream, UnreadBytes
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.conversation import UNREAD_BYTES, Conversation

TIMEOUT = 10.0
AWHILE = 0.05
"""Seconds until a stream without connection ends."""


class Connection:
    """A client's connection: `up` are its frames, `down` the server's."""

    def __init__(self, stream: ClientStream, received: int = 0) -> None:
        self._up: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._connection = stream.attach(pb.Attach(client="ada", session="s", received=received))
        self.down = stream.write(self._connection)
        self.reading = asyncio.create_task(stream.read(self._connection, self._frames()))

    def say(self, frame: bytes) -> None:
        self._up.put_nowait(frame)

    async def hear(self) -> pb.ServerMessage:
        return pb.ServerMessage.FromString(await asyncio.wait_for(anext(self.down), TIMEOUT))

    async def ends(self) -> None:
        """The server says no more."""
        with pytest.raises(StopAsyncIteration):
            while True:
                await self.hear()

    async def lose(self) -> None:
        """The connection breaks."""
        self._up.put_nowait(None)
        await asyncio.wait_for(self.reading, TIMEOUT)

    async def _frames(self) -> AsyncIterator[bytes]:
        while (frame := await self._up.get()) is not None:
            yield frame


class Server:
    """A stream, and what it told its owner."""

    def __init__(
        self,
        reconnect_timeout: float = TIMEOUT,
        most_kept: float = math.inf,
        all_unread: UnreadBytes | None = None,
    ) -> None:
        self.messages: list[tuple[pb.ClientMessage, int]] = []
        self.ends = 0
        self.connections: list[bool] = []
        """False for a connection that was lost, True for one that came after it."""
        self.changed = asyncio.Event()
        self.stream = ClientStream(
            "ada", "s", reconnect_timeout, False, self._message, self._end, self._connection, most_kept, all_unread
        )

    def _message(self, stream: ClientStream, message: pb.ClientMessage, frame: bytes, num_bytes: int) -> None:
        parsed = pb.ClientMessage.FromString(frame)
        parsed.ClearField("delivery")
        assert parsed == message, "the frame is the message, and how it was delivered"
        self.messages.append((message, num_bytes))
        self.changed.set()

    def _end(self, stream: ClientStream) -> None:
        self.ends += 1
        self.changed.set()

    def _connection(self, stream: ClientStream, is_there: bool) -> None:
        assert stream is self.stream
        self.connections.append(is_there)
        self.changed.set()

    async def until(self, happened: Callable[[], bool]) -> None:
        while not happened():
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), TIMEOUT)


def frame_of(conversation: Conversation, message: pb.ClientMessage) -> bytes:
    """The client's next frame."""
    conversation.put(message.SerializeToString())
    frame = conversation.frame()
    assert frame is not None
    return frame


def on_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 3 * TIMEOUT))

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


@on_a_loop
async def test_each_message_is_handed_on_once_and_in_order_over_two_connections() -> None:
    server, client = Server(), Conversation()
    frames = [frame_of(client, manifest(window)) for window in range(4)]
    first = Connection(server.stream)
    for frame in frames[:3]:
        first.say(frame)
    await first.lose()
    second = Connection(server.stream)
    for frame in frames[1:]:
        second.say(frame)
    await server.until(lambda: len(server.messages) == 4)
    assert server.messages == [(manifest(window), manifest(window).ByteSize()) for window in range(4)]
    assert server.ends == 0
    await second.lose()


@on_a_loop
async def test_messages_that_a_lost_connection_did_not_deliver_go_again() -> None:
    server = Server()
    first = Connection(server.stream)
    assert (await first.hear()).HasField("attached")
    for window in range(3):
        server.stream.put(save(window).SerializeToString())
        assert (await first.hear()).save.window == window
    await first.lose()
    second = Connection(server.stream, received=1)
    assert (await second.hear()).HasField("attached")
    assert [(await second.hear()).save.window for _ in range(2)] == [1, 2]
    await second.lose()


@on_a_loop
async def test_a_newer_connection_ends_the_older_one() -> None:
    server, client = Server(), Conversation()
    first = Connection(server.stream)
    assert (await first.hear()).HasField("attached")
    second = Connection(server.stream)
    await first.ends()
    frame = frame_of(client, manifest(0))
    first.say(frame)
    await asyncio.wait_for(first.reading, TIMEOUT)
    assert server.messages == [], "nobody listens to the older one"
    second.say(frame)
    await server.until(lambda: len(server.messages) == 1)
    await second.lose()
    assert server.ends == 0


@on_a_loop
async def test_without_a_connection_it_ends_after_a_while() -> None:
    server = Server(AWHILE)
    first = Connection(server.stream)
    await first.lose()
    second = Connection(server.stream)
    await asyncio.sleep(3 * AWHILE)
    assert server.ends == 0, "the client has come back"
    await second.lose()
    await server.until(lambda: server.ends == 1)
    assert server.stream.is_over
    server.stream.put(save(0).SerializeToString())  # to nobody
    server.stream.finish()
    assert server.ends == 1


@on_a_loop
async def test_a_connection_that_is_lost_or_back_is_told() -> None:
    server = Server(AWHILE)
    first = Connection(server.stream)
    assert server.connections == [], "the first one is no return"
    second = Connection(server.stream)
    await first.lose()
    assert server.connections == [], "another had taken its place"
    await second.lose()
    assert server.connections == [False]
    third = Connection(server.stream)
    assert server.connections == [False, True]
    await third.lose()
    await server.until(lambda: server.ends == 1)
    assert server.connections == [False, True, False]


@on_a_loop
async def test_nobody_hears_of_the_connection_of_a_stream_that_ends() -> None:
    """Closed by the server, or left by the client."""
    server = Server(AWHILE)
    connection = Connection(server.stream)
    server.stream.close()
    await connection.lose()
    await server.until(lambda: server.ends == 1)
    assert server.connections == []
    server = Server()
    connection = Connection(server.stream)
    connection.say(frame_of(Conversation(), pb.ClientMessage(leave=pb.Leave())))
    await asyncio.wait_for(connection.reading, TIMEOUT)
    assert server.ends == 1 and server.connections == []


@on_a_loop
async def test_more_unread_bytes_than_allowed_stop_the_reading_until_they_are_handled() -> None:
    server, client = Server(), Conversation()
    connection = Connection(server.stream)
    chunk = pb.ClientMessage(update=pb.UpdateChunk(payload=bytes(UNREAD_BYTES // 2)))
    for _ in range(4):
        connection.say(frame_of(client, chunk))
    await server.until(lambda: len(server.messages) == 2)
    for handled in (1, 2):
        await asyncio.sleep(0)
        assert len(server.messages) == 1 + handled, "two of them are more than allowed"
        server.stream.handled(server.messages[0][1])
        await server.until(lambda handled=handled: len(server.messages) == 2 + handled)
    server.stream.handled(server.messages[0][1])
    await connection.lose()


@on_a_loop
async def test_a_closed_stream_ends_when_the_client_has_the_last_message() -> None:
    server = Server()
    connection = Connection(server.stream)
    assert (await connection.hear()).HasField("attached")
    server.stream.put(save(0).SerializeToString())
    server.stream.close()
    last = await connection.hear()
    assert last.save.window == 0 and not server.stream.is_over
    client = Conversation()
    client.take(last.delivery, 1)
    acknowledgement = client.frame(acknowledge=True)
    assert acknowledgement is not None
    connection.say(acknowledgement)
    await connection.ends()
    assert server.stream.is_over and server.ends == 1


@on_a_loop
async def test_a_closed_stream_ends_after_a_while_without_the_client() -> None:
    server, client = Server(AWHILE), Conversation()
    connection = Connection(server.stream)
    server.stream.put(save(0).SerializeToString())
    server.stream.close()
    connection.say(frame_of(client, manifest(0)))
    await server.until(lambda: server.ends == 1)
    assert server.messages == [], "its messages count no more"
    await connection.ends()


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff\xff\xff",
        pb.ClientMessage(delivery=pb.Delivery(sequence=2)).SerializeToString(),
        pb.ClientMessage(delivery=pb.Delivery(received=1)).SerializeToString(),
        pb.ClientMessage(delivery=pb.Delivery(sequence=1, shared_start=0, shared_bytes=9)).SerializeToString(),
        frame_of(Conversation(), pb.ClientMessage(leave=pb.Leave())),
    ],
    ids=["no message", "a message is missing", "nothing was sent", "no memory is shared", "leave"],
)
def test_what_ends_a_stream_at_once(frame: bytes) -> None:
    async def run() -> None:
        server = Server()
        connection = Connection(server.stream)
        connection.say(frame)
        await asyncio.wait_for(connection.reading, TIMEOUT)
        assert server.ends == 1 and server.messages == []
        await connection.ends()

    asyncio.run(run())


def test_a_client_that_takes_nothing_is_lost_before_memory_is() -> None:
    async def run() -> None:
        server = Server(most_kept=3_000_000)
        for ends in (0, 0, 0, 1, 1):
            server.stream.put(bytes(1_000_000))
            assert server.ends == ends
        assert server.stream.reason == "it has left 4 MB unread, and the server keeps 3 MB for a client"

    asyncio.run(run())


def test_while_much_is_unhandled_only_clients_are_read_that_have_nothing_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_stream, "ALL_UNREAD_BYTES", 1000)

    async def run() -> None:
        unread = UnreadBytes()
        ada, bo = Server(all_unread=unread), Server(all_unread=unread)
        body = pb.ClientMessage(update=pb.UpdateChunk(payload=bytes(2000)))
        for server in (ada, bo):
            connection, client = Connection(server.stream), Conversation()
            for _ in range(2):
                connection.say(frame_of(client, body))
            await server.until(lambda server=server: bool(server.messages))
        await asyncio.sleep(AWHILE)
        assert len(ada.messages) == 1 and len(bo.messages) == 1
        _, num_bytes = ada.messages[0]
        ada.stream.handled(num_bytes)
        await ada.until(lambda: len(ada.messages) == 2)

    asyncio.run(run())
