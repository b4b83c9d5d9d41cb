"""Clients that keep a rank waiting for as long as it lets them, and what that costs the others."""

from __future__ import annotations

from typing import Any

import pytest
from unit.server.bad_clients import trio
from unit.server.fake_client import Alter
from unit.server.fakes import Rank, run_config

from fedbert_ds.server.network.events import Event, Received
from fedbert_ds.wire import fedbert_pb2 as pb

SOME: dict[str, Any] = {"expected": 3, "minimum": 2, "silence_timeout": 100.0}


def trickled(number: int, message: pb.ClientMessage) -> list[pb.ClientMessage]:
    """Each chunk of an update 4 bytes at a time."""
    chunk = message.update
    if not chunk.payload:
        return [message]
    parts = []
    for start in range(0, len(chunk.payload), 4):
        part = pb.UpdateChunk()
        part.CopyFrom(chunk)
        part.offset, part.payload = chunk.offset + start, chunk.payload[start : start + 4]
        parts.append(pb.ClientMessage(update=part))
    return parts


def slowly(client: str, event: Event) -> float:
    """Updates of bo take 99 s a message."""
    is_slow = client == "bo" and isinstance(event, Received) and event.message.HasField("update")
    return 99.0 if is_slow else 0.1


@pytest.mark.parametrize("order", ["arrival", "fixed"])
@pytest.mark.parametrize("mode", ["synchronous", "parallel"])
def test_who_trickles_its_update_is_dropped_alone(monkeypatch: pytest.MonkeyPatch, order: str, mode: str) -> None:
    config = run_config(
        clients=SOME, window={"order": order}, federation={"mode": mode, "average_every": 1}, run={"windows": 4}
    )
    rank = Rank(monkeypatch, config, trio(config, trickled), latency=slowly)
    started = rank.clock.now
    assert rank.run() == 4
    ada, bo, cy = rank.clients
    assert bo.refusal == "client bo was silent for 100 s (clients.silence_timeout)"
    assert ada.refusal is None and cy.refusal is None
    assert ada.windows_stepped == cy.windows_stepped == [0, 1, 2, 3]
    assert rank.clock.now - started < 300.0, "by the run's clock"


def silent_from(number: int) -> Alter:
    return lambda count, message: [message] if count < number else []


@pytest.mark.parametrize("after", range(1, 30, 4))
@pytest.mark.parametrize("on_loss", ["continue", "wait"])
@pytest.mark.parametrize("mode", ["synchronous", "parallel", "sequential"])
def test_a_run_that_is_stopped_saves_soon_whoever_is_silent(
    monkeypatch: pytest.MonkeyPatch, after: int, on_loss: str, mode: str
) -> None:
    """SLURM gives three minutes from its signal to the end."""
    clients = SOME | {"silence_timeout": 3600.0, "on_loss": on_loss, "join_timeout": 60.0}
    config = run_config(
        clients=clients, window={"order": "fixed"}, federation={"mode": mode}, run={"windows": 50, "save_every": 1000}
    )
    stopped_at = 0.0

    def stops(number: int, message: pb.ClientMessage) -> list[pb.ClientMessage]:
        nonlocal stopped_at
        if number == after:
            rank.stop.requested, stopped_at = True, rank.clock.now
        return silent_from(after)(number, message)

    rank = Rank(monkeypatch, config, trio(config, stops))
    window = rank.run()
    assert stopped_at and window < 50
    assert rank.clock.now - stopped_at < 90.0
    assert window == 0 or (window in rank.engine.saved and rank.clients[0].refusal is None)
