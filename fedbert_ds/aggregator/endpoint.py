"""The aggregator's endpoint: clients' streams as at a rank, and the ranks' calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import grpc

from fedbert_ds.errors import UserError
from fedbert_ds.server.network.client_stream import ClientStream
from fedbert_ds.server.network.door import DoorRules
from fedbert_ds.server.network.events import Received
from fedbert_ds.server.network.listener import Listener, Servicer, unread
from fedbert_ds.server.network.sessions import counts
from fedbert_ds.server.network.traffic import Traffic
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.aggregation import rank_name
from fedbert_ds.wire.channel import CONDUCT, OPEN, TlsFiles
from fedbert_ds.wire.introduction import introduction

A_RANK = rank_name(0)[0]


@dataclass(frozen=True)
class OpenAsked:
    """A coordinator called Open. Its answer, or the UserError that refuses it, goes to `answer`."""

    request: pb.OpenRun
    answer: Future[pb.Opened]


@dataclass(frozen=True)
class Ordered:
    """A message of a rank with an open conversation."""

    client: str
    """The rank's name, as `rank_name` has it: to the endpoint it is one of the clients."""
    order: pb.Order
    session: str


class AggregatorEndpoint(Listener[Received | Ordered | OpenAsked]):
    """Ranks and clients open streams with the sessions that `admit` names."""

    def __init__(
        self,
        host: str,
        port: int,
        tls: TlsFiles | None,
        reconnect_timeout: float,
        shares_memory: bool = True,
        rules: DoorRules | None = None,
    ) -> None:
        super().__init__(host, port, tls, reconnect_timeout, shares_memory, self._received, rules or DoorRules())
        self._traffic = Traffic()

    def admit(self, sessions: dict[str, str]) -> None:
        """Let these ranks and clients open a stream, each with its session, and no others; streams
        that they have with earlier ones end.
        """
        self._sessions = dict(sessions)
        super().admit(sessions)

    def hears(self, event: Any) -> bool:
        """Whether an event is of the session that its rank or client has, or of nobody's."""
        return counts(event, self._sessions)

    def send(self, client: str, message: pb.ServerMessage) -> None:
        """Queue a message for a client; messages to one that is gone are dropped."""
        if self.is_connected(client):
            self.send_body(client, self._traffic.serialize(message))

    def close(self, client: str, last: pb.ServerMessage) -> None:
        """Send one last message, then end the client's stream."""
        if self.is_connected(client):
            self.close_body(client, self._traffic.serialize(last))

    def report(self, rank: str, report: pb.Report) -> None:
        """Queue a message for a rank; messages to one that is gone are dropped."""
        self.send_body(rank, report.SerializeToString())

    def close_rank(self, rank: str, last: pb.Report) -> None:
        """Send one last message, then end the rank's stream; nothing more is heard of it."""
        self.close_body(rank, last.SerializeToString())

    def take_bytes(self) -> tuple[int, int]:
        """Bytes received and bytes queued to send, clients' only, since the last call."""
        return self._traffic.take()

    def servicer(self) -> Servicer:
        """The calls of clients and of ranks."""
        return _Servicer(self)

    async def open(self, request: pb.OpenRun) -> pb.Opened:
        """Make an Open an event and wait for its answer; raises the answer if it is a UserError."""
        answer: Future[pb.Opened] = Future()
        self._events.put((OpenAsked(request, answer), None))
        return await asyncio.wrap_future(answer)

    def _received(
        self, stream: ClientStream, message: pb.ClientMessage, frame: bytes, num_bytes: int
    ) -> Received | Ordered:
        if stream.client.startswith(A_RANK):
            return Ordered(stream.client, pb.Order.FromString(frame), stream.session)
        self._traffic.count_up(num_bytes)
        return Received(stream.client, message, stream.session)


class _Servicer(Servicer):
    """A rank's calls beside a client's."""

    def __init__(self, endpoint: AggregatorEndpoint) -> None:
        super().__init__(endpoint)
        self._endpoint = endpoint
        self.handlers[OPEN] = unread(self.open, pb.Opened.SerializeToString)
        self.handlers[CONDUCT] = grpc.stream_stream_rpc_method_handler(self.train)

    def let_in(self, context: grpc.aio.ServicerContext, attach: pb.Attach) -> None:
        """A rank has a secret in place of a name; a client is who its certificate says."""
        if attach.client.startswith(A_RANK):
            self._endpoint.door.let_in_a_rank(context.auth_context())
        else:
            super().let_in(context, attach)

    async def open(self, frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> pb.Opened:
        """Open."""
        await self.turn_away_beyond_rate(context)
        try:
            self._endpoint.door.let_in_a_rank(context.auth_context())
            return await self._endpoint.open(introduction(context.invocation_metadata(), pb.OpenRun))
        except UserError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
