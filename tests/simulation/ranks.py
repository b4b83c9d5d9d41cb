"""The ranks among themselves and with their clients: collectives, an endpoint, a thread beside the
body.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from simulation.link import Stream
from simulation.world import Task, World
from torch import Tensor

from fedbert_ds.federation.averaging import combine_ranks
from fedbert_ds.federation.client_update import ClientUpdate
from fedbert_ds.federation.influence import Vote
from fedbert_ds.server.network.decoding import Decoded, DecodedEvent
from fedbert_ds.server.network.events import (
    Attached,
    Connected,
    Detached,
    Disconnected,
    JoinAbandoned,
    JoinAsked,
    Knocked,
)
from fedbert_ds.wire import fedbert_pb2 as pb

Work = deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]]
"""Of a thread: futures, functions and arguments."""


class Board:
    """Where ranks meet: what each has written in every collective so far."""

    def __init__(self, world: World, world_size: int) -> None:
        self.world, self.world_size = world, world_size
        self.meetings: list[tuple[Any, dict[int, Any]]] = []
        """What it is about, and each rank's part."""
        self.combining: list[Work] = [deque() for _ in range(world_size)]
        """Work of each rank's thread beside the body, the oldest first."""


class Group:
    """One rank's part in the collectives; also its time: every operation of a rank passes here."""

    def __init__(self, board: Board, rank: int, task: Task, on_work: Callable[[], None]) -> None:
        self.rank, self.world_size = rank, board.world_size
        self.task = task
        self._board, self._world, self._on_work = board, board.world, on_work
        self._met = 0

    @property
    def now(self) -> float:
        return self._world.now

    def work(self) -> None:
        """The rank does something that it may be killed in."""
        self._on_work()
        if self.task.is_killed:
            self._world.wait(self.task, lambda: True)

    def work_seconds(self) -> float:
        """When the device is done with what begins now."""
        self.work()
        drawn = self._world.random.random()
        return self.now + (0.0 if drawn < 0.5 else drawn)

    def sleep(self, seconds: float) -> None:
        self._world.wait(self.task, lambda: False, seconds)

    def meet(self, about: Any, mine: Any) -> list[Any]:
        """Every rank's part. All must meet about the same, in the same order."""
        self.work()
        place, meetings = self._met, self._board.meetings
        self._met += 1
        if place == len(meetings):
            meetings.append((about, {}))
        others, parts = meetings[place]
        assert others == about, f"ranks disagree about a collective: {others} and {about}"
        parts[self.rank] = mine
        if len(parts) < self.world_size:
            self._world.wait(self.task, lambda: len(parts) == self.world_size)
        return [parts[rank] for rank in range(self.world_size)]

    def gather(self, mine: Any, kind: Any) -> list[Any]:
        return self.meet("gather", mine)

    def broadcast(self, from_rank_0: Any, kind: Any) -> Any:
        return self.meet("broadcast", from_rank_0)[0]

    def barrier(self) -> None:
        self.meet("barrier", None)


class InlineThread:
    """Does at once what a thread would do."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def shutdown(self, wait: bool, cancel_futures: bool) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(function(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done


class ThreadBeside:
    """A rank's thread beside the body: it works a little later, in order, and combines once every
    rank does.
    """

    together: Sequence[Sequence[ClientUpdate]] | None = None
    """The updates that the threads of all ranks combine just now."""

    def __init__(self, board: Board, rank: int) -> None:
        self._board, self._rank = board, rank

    def shutdown(self, wait: bool, cancel_futures: bool) -> None:
        self._board.combining[self._rank].clear()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        self._board.combining[self._rank].append((done, function, arguments))
        world = self._board.world
        drawn = world.random.random()
        if drawn < 0.3:
            self._work()
        else:
            world.after(drawn, self._work)
        return done

    def _work(self) -> None:
        queues = self._board.combining
        self._decode(queues[self._rank])
        while all(queue and queue[0][2] for queue in queues):
            work = [queue.popleft() for queue in queues]
            assert len({average for _, _, (_, average) in work}) == 1, "ranks combine different windows"
            ThreadBeside.together = [list(updates.values()) for _, _, (updates, _) in work]
            for done, combine, arguments in work:
                done.set_result(combine(*arguments))
            ThreadBeside.together = None
            for queue in queues:
                self._decode(queue)

    def _decode(self, queue: Work) -> None:
        while queue and not queue[0][2]:  # decoding has no arguments
            done, decode, _ = queue.popleft()
            try:
                done.set_result(decode())
            except Exception as error:
                done.set_exception(error)


class Updates:
    """The updates of all ranks, which really come by torch.distributed."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def votes(self, mine: Mapping[str, Vote]) -> dict[str, Vote]:
        """Of this rank's clients alone: nothing is bounded here."""
        return dict(mine)

    def mean(self, mine: Mapping[str, ClientUpdate], shapes: Any, average: bool) -> dict[str, Tensor]:
        by_rank = ThreadBeside.together
        if by_rank is None:
            by_rank = self._group.meet("mean", list(mine.values()))
        return combine_ranks(by_rank, shapes, average)

    def stacked(self, mine: Mapping[str, Tensor], clients: Sequence[str]) -> Tensor:
        raise AssertionError("robust rules are not simulated")


class Endpoint:
    """A rank's endpoint: streams of its clients, events for the rank."""

    def __init__(self, world: World, group: Group) -> None:
        self.sessions: dict[str, str] = {}
        self.streams: dict[str, Stream] = {}
        self._world, self._group = world, group
        self._events: deque[DecodedEvent] = deque()

    # -- for the rank ------------------------------------------------------------------------------

    def next_event(self, timeout: float) -> DecodedEvent | None:
        self._group.work()
        if not self._events and timeout > 0:
            self._world.wait(self._group.task, lambda: bool(self._events), timeout)
        return self._events.popleft() if self._events else None

    def admit(self, sessions: dict[str, str]) -> None:
        for client, session in sessions.items():
            stream = self.streams.get(client)
            if stream is not None and stream.session != session:
                stream.end()
        self.sessions.update(sessions)

    def revoke(self, client: str) -> None:
        self.sessions.pop(client, None)

    def send(self, client: str, message: pb.ServerMessage) -> None:
        self._group.work()
        if (stream := self.streams.get(client)) is not None:
            stream.send(message)

    def close(self, client: str, last: pb.ServerMessage) -> None:
        self._group.work()
        if (stream := self.streams.pop(client, None)) is not None:
            stream.close(last)

    def take_bytes(self) -> tuple[int, int]:
        return 0, 0

    def keep_at_most(self, num_bytes: float) -> None:
        pass

    def start(self) -> int:
        return 0

    def stop(self, grace: float = 5.0) -> None:
        pass

    # -- for clients -------------------------------------------------------------------------------

    def join(self, event: JoinAsked | JoinAbandoned) -> None:
        """A client joins, or goes away while it waits."""
        self._events.append(event)

    def knock(self, client: str) -> None:
        """Every rank hears that a client waits at rank 0."""
        self._events.append(Knocked(client))

    def open(self, stream: Stream) -> bool:
        """A client opens its stream; False for a wrong session."""
        if not stream.session or self.sessions.get(stream.client) != stream.session:
            return False
        self.streams[stream.client] = stream
        self._events.append(Connected(stream.client, stream.session))
        return True

    def received(self, stream: Stream, message: pb.ClientMessage) -> None:
        """A message of a client, with its numbers."""
        kind = message.WhichOneof("body")
        tensor = None
        if kind == "activations":
            tensor = message.activations.values.payload
        elif kind == "gradient":
            tensor = message.gradient.hidden.payload
        self._events.append(Decoded(stream.client, message, tensor, stream.session))  # type: ignore[arg-type]

    def connection_changed(self, stream: Stream, is_there: bool) -> None:
        """A connection was lost or is back."""
        if self.streams.get(stream.client) is stream:
            self._events.append((Attached if is_there else Detached)(stream.client, stream.session))

    def ended(self, stream: Stream) -> None:
        """A client did not come back in time."""
        if self.streams.get(stream.client) is stream:
            del self.streams[stream.client]
            self._events.append(Disconnected(stream.client, session=stream.session))
