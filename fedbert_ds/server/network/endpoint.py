"""A rank's endpoint, inside its process: a Listener for messages in place of bytes."""

from __future__ import annotations

from fedbert_ds.server.network.client_stream import ClientStream
from fedbert_ds.server.network.door import DoorRules
from fedbert_ds.server.network.events import Received
from fedbert_ds.server.network.listener import Listener
from fedbert_ds.server.network.traffic import Traffic
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.channel import TlsFiles
from fedbert_ds.wire.conversation import RECONNECT_SECONDS


class Endpoint(Listener[Received]):
    """A RankEndpoint whose event loop is a thread of the rank's process."""

    def __init__(
        self,
        host: str,
        port: int,
        tls: TlsFiles | None,
        reconnect_timeout: float = RECONNECT_SECONDS,
        shares_memory: bool = True,
        rules: DoorRules | None = None,
    ) -> None:
        super().__init__(host, port, tls, reconnect_timeout, shares_memory, self._received, rules or DoorRules())
        self._traffic = Traffic()

    def send(self, client: str, message: pb.ServerMessage) -> None:
        """Queue a message for a client; messages to one that is gone are dropped."""
        if self.is_connected(client):
            self.send_body(client, self._traffic.serialize(message))

    def close(self, client: str, last: pb.ServerMessage) -> None:
        """Send one last message, then end the client's stream."""
        if self.is_connected(client):
            self.close_body(client, self._traffic.serialize(last))

    def take_bytes(self) -> tuple[int, int]:
        """Bytes received and bytes queued to send since the last call."""
        return self._traffic.take()

    def _received(self, stream: ClientStream, message: pb.ClientMessage, frame: bytes, num_bytes: int) -> Received:
        self._traffic.count_up(num_bytes)
        return Received(stream.client, message, stream.session)
