"""A rank whose clients hold the whole model: windows without micro-batches, reports, updates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from unit.server.bad_clients import SOME, beside, instead, trio, twice, with_field
from unit.server.fake_client import GONE, HALF
from unit.server.fakes import Rank, run_config

from fedbert_ds.errors import RunError
from fedbert_ds.server.network.events import Event, Received
from fedbert_ds.wire import fedbert_pb2 as pb

WHOLE: dict[str, Any] = {"cut": "whole", "federation": {"mode": "parallel", "average_every": 2}, "run": {"windows": 4}}


def kinds(rank: Rank, client: str) -> list[str]:
    """What the rank sent to a client; of an update the last chunk alone."""
    sent = [message for name, message in rank.endpoint.sent if name == client]
    return [
        str(message.WhichOneof("body")) for message in sent if not message.HasField("update") or message.update.last
    ]


def test_a_window_is_opened_reported_and_averaged_when_due(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(**WHOLE)
    rank = Rank(monkeypatch, config, trio(config))
    assert rank.run() == 4
    opened = [kind for kind in kinds(rank, "ada") if kind in ("open", "update", "save")]
    assert opened == ["open", "open", "update", "open", "open", "update", "save"]
    assert set(kinds(rank, "ada")) == {"begin", "reference", "plan", "open", "update", "save"}
    assert len(rank.engine.steps) == 4 and rank.engine.tokens == 0 and not rank.engine.backwards
    tokens = sum(sum(client.lengths) for client in rank.clients)
    masked = sum(length // 2 for client in rank.clients for length in client.lengths)
    for status in rank.statuses:
        tally = status.tally
        assert (tally.tokens, tally.masked_tokens, tally.lost_masked_tokens) == (tokens, masked, 0)
        assert tally.loss_sum == 2.0 * masked and not tally.forwards and not tally.dummy_micro_batches
    # Changes are the lengths of names. So are the weights that clients name, which nobody hears.
    expected = (3.0 * 6 + 2.0 * 5 + 2.0 * 6) / masked
    for client in rank.clients:
        assert client.windows_stepped == [0, 1, 2, 3] and client.refusal is None
        assert len(client.updates) == 3
        for change in client.updates[1:]:
            torch.testing.assert_close(change["table"], torch.full(HALF["table"], expected))
    model = rank.collect(4)
    torch.testing.assert_close(model["table"], torch.full(HALF["table"], 2 * expected))
    assert not any("update_request" in kinds(rank, client.name) for client in rank.clients)


def test_no_window_is_trained_before_it_runs_so_that_a_state_is_saved_between_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = run_config(**{**WHOLE, "run": {"windows": 4, "save_every": 1}})
    rank = Rank(monkeypatch, config, trio(config))
    rank.run()
    order = [kind for kind in kinds(rank, "ada") if kind in ("open", "save")]
    assert order == ["open", "save"] * 4
    assert rank.engine.saved == [1, 2, 3, 4]


def test_a_client_that_leaves_inside_a_window_loses_that_window_s_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(**WHOLE, clients=SOME)
    alter = instead("trained", lambda message: [message, GONE], which=5)  # the second part of window 1
    rank = Rank(monkeypatch, config, trio(config, alter))
    assert rank.run() == 4
    mine = sum(length // 2 for length in rank.clients[1].lengths)
    assert [status.tally.lost_masked_tokens for status in rank.statuses] == [0, mine, 0, 0]
    assert "client bo disconnected" in rank.problems
    expected = (3.0 + 2.0) / 2
    for change in rank.clients[0].updates[1:]:
        torch.testing.assert_close(change["table"], torch.full(HALF["table"], expected))


def test_a_client_that_trains_for_ever_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(**WHOLE, clients=SOME)
    rank = Rank(monkeypatch, config, trio(config, instead("trained", lambda message: [], which=3)))
    assert rank.run() == 4
    assert rank.problems == ["client bo was silent for 300 s (clients.silence_timeout)"]


def test_a_long_window_reported_part_by_part_is_not_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    def latency(client: str, event: Event) -> float:
        is_report = isinstance(event, Received) and event.message.WhichOneof("body") == "trained"
        return 250.0 if client == "bo" and is_report else 0.0

    config = run_config(**WHOLE)
    rank = Rank(monkeypatch, config, trio(config), latency=latency)
    assert rank.run() == 4
    assert not rank.problems


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda: with_field("trained", "loss_sum", float("nan")), "a loss of nan"),
        (lambda: with_field("trained", "masked_tokens", 100), "100 masked tokens instead of 5"),
        (lambda: with_field("trained", "window", 1), "report of window 1, which was not asked for"),
        (lambda: twice("update"), "was not expected"),
        (lambda: beside("trained", pb.ClientMessage(activations=pb.Activations(window=0))), "nobody asked for"),
    ],
    ids=["loss", "count", "window", "update", "activations"],
)
def test_a_bad_report_is_its_client_s_fault_alone(monkeypatch: pytest.MonkeyPatch, alter: Any, reason: str) -> None:
    config = run_config(**WHOLE, clients=SOME)
    rank = Rank(monkeypatch, config, trio(config, alter()))
    assert rank.run() == 4
    ada, bo, cy = rank.clients
    assert bo.refusal is not None and reason in bo.refusal and "client bo" in bo.refusal
    assert ada.windows_stepped == cy.windows_stepped == [0, 1, 2, 3]


def test_too_few_clients_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(**WHOLE)
    rank = Rank(monkeypatch, config, trio(config, instead("trained", lambda message: [GONE])))
    with pytest.raises(RunError, match="2 of 3 clients left"):
        rank.run()
