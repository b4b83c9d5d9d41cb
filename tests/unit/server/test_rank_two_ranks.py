"""Two ranks and their collectives: they keep step whoever fails."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from unit.server.bad_clients import BAD
from unit.server.fake_client import FakeClient
from unit.server.fakes import Clock, FakeEndpoint, FakeEngine, InlineThread, Served, run_config, seats

from fedbert_ds.server.contract import RankStatus


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

    def gather(self, mine: Any) -> list[Any]:
        return self._board.meet(self.rank, mine)

    def broadcast(self, from_rank_0: Any) -> Any:
        return self.gather(from_rank_0)[0]

    def barrier(self) -> None:
        self.gather(None)


SECONDS_OF_WORK = 1000.0
"""Of each forward and backward; so long that what steps really take does not matter."""


class CollectiveEngine(FakeEngine):
    """Every backward and step needs the other rank; so do forwards with `lockstep_forwards`."""

    def __init__(self, rank: int, board: Board, lockstep_forwards: bool) -> None:
        super().__init__(seconds=SECONDS_OF_WORK, lockstep_forwards=lockstep_forwards)
        self._rank, self._board = rank, board

    def forward(self, micro_batch: int, body_input: Any) -> torch.Tensor:
        if self.lockstep_forwards:
            self._together("forward")
        return super().forward(micro_batch, body_input)

    def backward(self, micro_batch: int, hidden_gradient: torch.Tensor, is_last: bool) -> torch.Tensor:
        self._together(("backward", is_last))
        return super().backward(micro_batch, hidden_gradient, is_last)

    def step(self, learning_rate: float, client_norm: float = 0.0) -> float:
        # Not the norm: updates of these ranks are combined apart.
        self._together(("step", learning_rate))
        return super().step(learning_rate, client_norm)

    def _together(self, what: Any) -> None:
        both = self._board.meet(self._rank, what)
        assert both[0] == both[1], f"ranks disagree about a collective: {both}"


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
    places = {
        client.name: replace(seat, rank=number)
        for number, clients in enumerate(by_rank)
        for client, seat in zip(clients, seats(clients).values(), strict=True)
    }
    board, outcomes = Board(), [None, None]
    tallies: list[RankStatus] = []
    engines = [CollectiveEngine(number, board, lockstep_forwards) for number in range(2)]

    def serve(number: int) -> None:
        try:
            endpoint = FakeEndpoint(Clock(), by_rank[number], lambda client, event: 0.0)
            served = Served(config, engines[number], endpoint, BoardRankGroup(number, board), places)
            outcomes[number] = served.train(tallies)
        except BaseException as error:
            outcomes[number] = error
            board.leave()

    threads = [threading.Thread(target=serve, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert outcomes == [3, 3]
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
