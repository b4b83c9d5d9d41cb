"""One bad client harms itself alone: it is refused with a reason, and the others train on."""

from __future__ import annotations

from typing import Any

import pytest
from unit.server.bad_clients import BAD, BAD_ROWS, SOME, trio
from unit.server.fake_client import GONE
from unit.server.fakes import Rank, run_config

from fedbert_ds.errors import RunError


@pytest.mark.parametrize("fault", BAD)
def test_one_bad_client_is_refused_alone(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    make_alter, reason = BAD[fault]
    config = run_config(clients=SOME)
    rank = Rank(monkeypatch, config, trio(config, make_alter()))
    assert rank.run() == 2
    ada, bo, cy = rank.clients
    for honest in (ada, cy):
        assert honest.windows_stepped == [0, 1] and honest.refusal is None
        assert honest.hidden_states == 2 * sum(length // 2 for length in honest.lengths)
    assert bo.refusal is not None and reason in bo.refusal and "client bo" in bo.refusal
    assert "\n" not in bo.refusal
    assert rank.problems == [bo.refusal], "the run says so too, once"
    assert rank.endpoint.revoked == {"bo"}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_bad_rows_are_refused_alone(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    make_alter, reason = BAD_ROWS[fault]
    config = run_config(cut="rows", clients=SOME)
    rank = Rank(monkeypatch, config, trio(config, make_alter()))
    assert rank.run() == 2
    ada, bo, cy = rank.clients
    assert ada.windows_stepped == cy.windows_stepped == [0, 1]
    assert bo.refusal is not None and bo.refusal.endswith(reason)


def test_the_lost_share_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """bo is refused at its first gradient: all its masked tokens are missing from window 0, none
    from window 1.
    """
    config = run_config(clients=SOME)
    rank = Rank(monkeypatch, config, trio(config, BAD["gradient that is not finite"][0]()))
    rank.run()
    assert [status.tally.lost_masked_tokens for status in rank.statuses] == [2 + 1 + 1 + 1, 0]


def test_without_a_minimum_one_bad_client_ends_the_run_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config()
    rank = Rank(monkeypatch, config, trio(config, BAD["gradient out of all measure"][0]()))
    with pytest.raises(RunError) as caught:
        rank.run()
    assert str(caught.value).startswith("client bo: gradient of micro-batch")
    assert "2 of 3 clients left, the run needs 3 (clients.minimum); saved up to window 1: " in str(caught.value)


@pytest.mark.parametrize("federation", [{"mode": "synchronous"}, {"mode": "parallel"}], ids=lambda f: f["mode"])
@pytest.mark.parametrize("after", range(40))
def test_a_client_may_leave_after_any_message(
    monkeypatch: pytest.MonkeyPatch, after: int, federation: dict[str, Any]
) -> None:
    config = run_config(clients=SOME, federation=federation, run={"save_every": 1})
    rank = Rank(monkeypatch, config, trio(config, lambda number, message: [message if number < after else GONE]))
    assert rank.run() == 2
    ada, _, cy = rank.clients
    assert ada.windows_stepped == cy.windows_stepped == [0, 1]
    assert {"ada", "cy"} <= rank.server.clients


@pytest.mark.parametrize("after", range(0, 40, 3))
def test_a_client_may_fall_silent_after_any_message(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    config = run_config(clients=SOME, run={"save_every": 1})
    rank = Rank(monkeypatch, config, trio(config, lambda number, message: [message] if number < after else []))
    assert rank.run() == 2
    ada, bo, cy = rank.clients
    assert ada.windows_stepped == cy.windows_stepped == [0, 1]
    if bo.refusal is not None:
        assert bo.refusal == "client bo was silent for 300 s (clients.silence_timeout)"
        assert rank.endpoint.revoked == {"bo"}
    assert ada.refusal is None and cy.refusal is None
