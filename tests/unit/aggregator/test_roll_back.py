"""Windows that are undone: every rank says so, and clients hear of it one after another."""

from __future__ import annotations

import pytest

from fedbert_ds.aggregator.roll_back import RollBack
from fedbert_ds.errors import WireError
from fedbert_ds.wire import fedbert_pb2 as pb

UPDATE = pb.ClientMessage(update=pb.UpdateChunk(window=3))


def begun(attempt: int) -> pb.ClientMessage:
    return pb.ClientMessage(begun=pb.Begun(attempt=attempt))


def test_the_last_rank_counts() -> None:
    roll_back = RollBack(3)
    assert [roll_back.add(rank, 1) for rank in (2, 0, 0, 1)] == [False, False, False, True]
    assert [roll_back.add(rank, 2) for rank in (0, 1, 2)] == [False, False, True]


@pytest.mark.parametrize("attempt", [0, 1, 2])
def test_a_time_that_is_over_is_an_error(attempt: int) -> None:
    roll_back = RollBack(1)
    roll_back.add(0, 2)
    with pytest.raises(WireError, match=f"rank 0: windows undone for time {attempt} after time 2"):
        roll_back.add(0, attempt)


def test_whoever_begins_between_two_ranks_words_waits() -> None:
    roll_back = RollBack(2)
    ada, bo = (pb.BeginClient(client=client) for client in ("ada", "bo"))
    assert not roll_back.waits(ada)
    roll_back.add(1, 1)
    assert roll_back.waits(ada) and roll_back.waits(bo)
    roll_back.add(0, 1)
    assert roll_back.undone([]) == [ada, bo] and roll_back.undone([]) == []
    assert not roll_back.waits(ada)


def test_a_client_is_heard_again_once_it_has_heard() -> None:
    roll_back = RollBack(1)
    assert roll_back.hears("ada", UPDATE) and not roll_back.hears("ada", begun(0)), "a word is no update"
    roll_back.add(0, 1)
    roll_back.undone(["ada", "bo"])
    for message in (UPDATE, begun(0), UPDATE):
        assert not roll_back.hears("ada", message)
    assert not roll_back.hears("ada", begun(1))
    assert roll_back.hears("ada", UPDATE) and roll_back.hears("cy", UPDATE) and not roll_back.hears("bo", UPDATE)
    roll_back.forget("bo")
    assert roll_back.hears("bo", UPDATE), "another process of this name"
