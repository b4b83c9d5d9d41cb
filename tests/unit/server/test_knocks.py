"""Who waits at rank 0 is heard at every rank, again and again until it is let in."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from fedbert_ds.server.knocks import Knocks
from fedbert_ds.server.network.events import Detached, Knocked

PATIENCE_SECONDS = 30.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Every look at it takes a second."""
    seconds = itertools.count(1000)
    made = SimpleNamespace(monotonic=lambda: float(next(seconds)))
    monkeypatch.setattr("fedbert_ds.server.knocks.time", made)
    return made


def test_on_one_rank_a_knock_is_an_event_for_as_long_as_somebody_waits(clock: SimpleNamespace) -> None:
    waiting = ["ada", "bo"]
    take = Knocks(0, 1, {}).among(lambda timeout: Detached("ada"), lambda: waiting)
    assert [take(0.0), take(0.0)] == [Knocked("ada"), Knocked("bo")]
    waiting.clear()
    # What was heard meanwhile is left, then come the other events.
    heard = [take(0.0) for _ in range(6)]
    assert heard[-1] == Detached("ada") and heard.count(Knocked("bo")) <= 2


def test_other_ranks_hear_of_it_through_the_store() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    first, second = Knocks(0, 2, where), Knocks(1, 2, where)
    take_first = first.among(lambda timeout: None, lambda: ("ada",))
    take_second = second.among(lambda timeout: None, lambda: ())
    for knocks in (first, second):
        knocks.start()
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while take_second(0.0) != Knocked("ada"):
            take_first(0.0)
            time.sleep(0.01)
            assert time.monotonic() < deadline
    finally:
        for knocks in (first, second):
            knocks.stop()
