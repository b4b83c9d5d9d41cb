"""Two ranks and their collectives: they keep step whoever fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from unit.server.bad_clients import BAD, larger
from unit.server.fake_client import GONE, FakeClient
from unit.server.fakes import (
    Clock,
    FakeEndpoint,
    FakeEngine,
    InlineThread,
    Served,
    hello_of,
    joined,
    retold,
    run_config,
    seats,
)

from fedbert_ds.errors import NotFinite
from fedbert_ds.server.admission import Seat
from fedbert_ds.server.body.device_work import DeviceWork
from fedbert_ds.server.body.packed_input import BodyInput
from fedbert_ds.server.contract import RankStatus
from fedbert_ds.server.network.events import Connected
from fedbert_kernels.encoded import Encoded


class Board:
    """Where two ranks meet: each writes something, waits for the other, and reads both."""

    def __init__(self) -> None:
        self._written: list[Any] = [None, None]
        self._barrier = threading.Barrier(2, timeout=20.0)

    def meet(self, rank: int, mine: Any) -> list[Any]:
        self._written[rank] = mine
        self._barrier.wait()
        both = list(self._written)
        self._barrier.wait()
        return both

    def leave(self) -> None:
        """The other rank must not wait for one that has failed."""
        self._barrier.abort()


class BoardRankGroup:
    """Stands for torch.distributed between two threads."""

    world_size, group, update_group = 2, None, None

    def __init__(self, rank: int, board: Board) -> None:
        self.rank = rank
        self._board = board

    def gather(self, mine: Any, kind: Any) -> list[Any]:
        return [retold(one, kind) for one in self._board.meet(self.rank, mine)]

    def gather_beside(self, mine: Any, kind: Any) -> list[Any]:
        return [retold(mine, kind)]  # what is exchanged is not what these tests look at

    def broadcast(self, from_rank_0: Any, kind: Any) -> Any:
        return retold(self._board.meet(self.rank, from_rank_0)[0], kind)

    def barrier(self) -> None:
        self._board.meet(self.rank, None)


SECONDS_OF_WORK = 1000.0
"""Of each forward and backward; so long that what steps really take does not matter."""


class CollectiveEngine(FakeEngine):
    """Every backward and step needs the other rank; so do forwards with `lockstep_forwards`."""

    def __init__(self, rank: int, board: Board, lockstep_forwards: bool) -> None:
        super().__init__(seconds=SECONDS_OF_WORK, lockstep_forwards=lockstep_forwards)
        self._rank, self._board = rank, board

    def forward(self, micro_batch: int, body_input: BodyInput, codec: str = "fp32") -> DeviceWork:
        if self.lockstep_forwards:
            self._together("forward")
        return super().forward(micro_batch, body_input, codec)

    def evaluate(self, body_input: BodyInput, codec: str = "fp32") -> DeviceWork:
        if self.lockstep_forwards:
            self._together("evaluate")
        return super().evaluate(body_input, codec)

    def backward(self, micro_batch: int, parts: Sequence[Encoded], codec: str = "fp32") -> DeviceWork:
        self._together("backward")
        return super().backward(micro_batch, parts, codec)

    def step(self, learning_rate: float, client_norm: float = 0.0) -> float:
        # Not the norm: updates of these ranks are combined apart.
        self._together(("step", learning_rate))
        return super().step(learning_rate, client_norm)

    def drop_gradients(self) -> None:
        self._together("drop")
        super().drop_gradients()

    def _together(self, what: Any) -> None:
        both = self._board.meet(self._rank, what)
        assert both[0] == both[1], f"ranks disagree about a collective: {both}"


def places_of(by_rank: Sequence[Sequence[FakeClient]]) -> dict[str, Seat]:
    """A seat for each client, at its rank."""
    return {
        client.name: replace(seat, rank=number)
        for number, clients in enumerate(by_rank)
        for client, seat in zip(clients, seats(clients).values(), strict=True)
    }


def side_by_side(board: Board, train: Callable[[int], int], ends_both: type[BaseException] | None = None) -> list[Any]:
    """What `train(rank)` returns or raises for both ranks, each in a thread.

    After an error the other rank is not waited for, unless `ends_both` says that it ends by itself.
    """
    outcomes: list[Any] = [None, None]

    def run(number: int) -> None:
        try:
            outcomes[number] = train(number)
        except BaseException as error:
            outcomes[number] = error
            if ends_both is None or not isinstance(error, ends_both):
                board.leave()

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return outcomes


@pytest.mark.parametrize("fault", [None, "activations twice", "gradient that is not finite", "manifest of nothing"])
@pytest.mark.parametrize("order", ["arrival", "fixed"])
@pytest.mark.parametrize("lockstep_forwards", [False, True])
def test_two_ranks_keep_step_whoever_fails(
    monkeypatch: pytest.MonkeyPatch, fault: str | None, order: str, lockstep_forwards: bool
) -> None:
    """Rank 1 has one client, with less text than rank 0's two, and loses it: it goes on with
    dummies alone.
    """
    monkeypatch.setattr("fedbert_ds.server.network.outbox.ThreadPoolExecutor", InlineThread)
    config = run_config(clients={"minimum": 1}, window={"order": order}, run={"windows": 3, "save_every": 2})
    ada, bo = FakeClient("ada", config), FakeClient("bo", config, (2, 2, 8, 1))
    cy = FakeClient("cy", config, (3, 4), *([BAD[fault][0]()] if fault else []))
    by_rank = [[ada, bo], [cy]]
    places = places_of(by_rank)
    board = Board()
    tallies: list[RankStatus] = []
    engines = [CollectiveEngine(number, board, lockstep_forwards) for number in range(2)]

    def train(number: int) -> int:
        endpoint = FakeEndpoint(Clock(), by_rank[number], lambda client, event: 0.0)
        return Served(config, engines[number], endpoint, BoardRankGroup(number, board), places).train(tallies)

    assert side_by_side(board, train) == [3, 3]
    assert engines[0].saved == engines[1].saved == [2, 3]
    assert len(engines[0].backwards) == len(engines[1].backwards)
    for client in (ada, bo) if fault else (ada, bo, cy):
        assert client.windows_stepped == [0, 1, 2]
        assert client.hidden_states == 3 * sum(length // 2 for length in client.lengths)
    assert (cy.refusal is not None) == (fault is not None)
    assert any(status.tally.dummy_micro_batches for status in tallies)
    for tally in (status.tally for status in tallies):
        # A dummy keeps the device busy, forward and backward, and is no work.
        work = tally.forwards + tally.backwards - 2 * tally.dummy_micro_batches
        assert round(tally.busy_seconds / SECONDS_OF_WORK) == work


@pytest.mark.parametrize("is_sound", [True, False])
@pytest.mark.parametrize("lockstep_forwards", [False, True])
def test_numbers_that_spoil_results_of_one_rank_are_told_from_a_body_that_is_spoilt(
    monkeypatch: pytest.MonkeyPatch, lockstep_forwards: bool, is_sound: bool
) -> None:
    """Rank 1 has the liar; or else both have a body that makes nothing finite."""
    monkeypatch.setattr("fedbert_ds.server.network.outbox.ThreadPoolExecutor", InlineThread)
    config = run_config(clients={"minimum": 1}, federation={"bound": None})
    liar = FakeClient("cy", config, (3, 4), *([larger("activations", 2e5)] if is_sound else []))
    by_rank = [[FakeClient("ada", config), FakeClient("bo", config, (2, 2, 8, 1))], [liar]]
    places = places_of(by_rank)
    board = Board()
    engines = [CollectiveEngine(number, board, lockstep_forwards) for number in range(2)]

    def train(number: int) -> int:
        engines[number].most = 1e5 if is_sound else 0.0
        endpoint = FakeEndpoint(Clock(), by_rank[number], lambda client, event: 0.0)
        return Served(config, engines[number], endpoint, BoardRankGroup(number, board), places).train([])

    # In lockstep both hear the same answer of the body.
    outcomes = side_by_side(board, train, ends_both=NotFinite if lockstep_forwards else None)
    if is_sound:
        assert outcomes == [2, 2] and liar.refusal == "client cy: what it sent makes results that are not finite"
        assert all(client.windows_stepped == [0, 1] for client in by_rank[0])
    elif lockstep_forwards:
        assert [type(outcome) for outcome in outcomes] == [NotFinite, NotFinite], "they meet, and end together"
    else:
        assert NotFinite in [type(outcome) for outcome in outcomes]


@pytest.mark.parametrize("after", [3, 9, 14, 21, 30])
@pytest.mark.parametrize("lockstep_forwards", [False, True])
def test_a_rank_that_waits_for_its_client_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, after: int, lockstep_forwards: bool
) -> None:
    """Rank 1 loses cy, which joins at rank 0 and comes back to rank 1; no rank moves meanwhile."""
    monkeypatch.setattr("fedbert_ds.server.network.outbox.ThreadPoolExecutor", InlineThread)
    config = run_config(clients={"on_loss": "wait"}, run={"windows": 3, "save_every": 2})
    by_rank = [
        [FakeClient("ada", config), FakeClient("bo", config, (2, 2, 8, 1))],
        [FakeClient("cy", config, (3, 4), lambda number, message: [message if number < after else GONE])],
    ]
    places = places_of(by_rank)
    board = Board()
    engines = [CollectiveEngine(number, board, lockstep_forwards) for number in range(2)]
    endpoints = [FakeEndpoint(Clock(), by_rank[number], lambda client, event: 0.0) for number in range(2)]
    again = FakeClient("cy", config, (3, 4))
    asked, answer = joined(hello_of("cy"))

    def back(done: Any) -> None:
        assert done.result().session == endpoints[1].sessions["cy"], "its rank lets it in before it is welcomed"
        endpoints[1].clients["cy"] = again
        endpoints[1].closed.discard("cy")
        endpoints[1].post("cy", Connected("cy"))

    answer.add_done_callback(back)
    endpoints[1].on_gone = lambda name: endpoints[0].post(name, asked)
    statuses: list[RankStatus] = []
    served: list[Served] = []

    def train(number: int) -> int:
        one = Served(config, engines[number], endpoints[number], BoardRankGroup(number, board), places)
        served.append(one)
        return one.train(statuses if number == 0 else [])

    assert side_by_side(board, train) == [3, 3]
    assert len(engines[0].steps) == len(engines[1].steps) == 3 and len(engines[0].dropped) == len(engines[1].dropped)
    assert served[0].rolled_back == served[1].rolled_back
    if answer.done():
        assert len(served[0].rolled_back) == 1 and again.windows_stepped[-1] == 2
    for client in by_rank[0]:
        assert client.windows_stepped == [0, 1, 2], "each step once"
    assert [status.tally.lost_masked_tokens for status in statuses] == [0] * 6
