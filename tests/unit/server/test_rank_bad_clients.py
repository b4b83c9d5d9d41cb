"""One bad client harms itself alone: it is refused with a reason, and the others train on."""

from __future__ import annotations

import math
from typing import Any

import pytest
from unit.server.bad_clients import BAD, BAD_ROWS, SOME, larger, trio
from unit.server.fake_client import GONE, FakeClient
from unit.server.fakes import FakeEngine, Rank, run_config

from fedbert_ds.errors import NotFinite, RunError
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_kernels.encoded import Encoded


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


# -- well-formed lies ------------------------------------------------------------------------------


class Unchecked(FakeClient):
    """What comes back to it follows from what counted, and not from what it sent."""

    def _check_input_gradient(self, message: pb.InputGradient) -> None:
        pass


def received(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """From now on the largest gradient that each backward of a FakeEngine gets."""
    largest: list[float] = []
    backward = FakeEngine.backward

    def recorded(self: FakeEngine, micro_batch: int, parts: Any, *others: Any) -> Any:
        largest.append(max(Encoded.join(parts).decode().abs().flatten().tolist(), default=0.0))
        return backward(self, micro_batch, parts, *others)

    monkeypatch.setattr(FakeEngine, "backward", recorded)
    return largest


def test_a_liars_gradients_count_for_so_many_times_what_is_typical_and_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    largest = received(monkeypatch)
    windows = 12
    config = run_config(run={"windows": windows}, federation={"bound": 4.0})
    ada, bo, cy = trio(config)
    liar = Unchecked("bo", config, bo.lengths, larger("gradient", 1e5))
    rank = Rank(monkeypatch, config, [ada, liar, cy])
    assert rank.run() == windows
    in_each = len(largest) // windows
    assert max(largest[:in_each]) > 1e4, "nothing is typical before anybody has sent anything"
    assert max(largest[in_each:]) < 4.0 * 4 * math.sqrt(20)
    assert all(status.tally.bounded > 0 for status in rank.statuses[1:])
    first, tenth = (problem for problem in rank.problems if "client bo: its gradient was" in problem)
    assert "(federation.bound), and is scaled down" in first and tenth.endswith("; 10 times so far")


def test_honest_clients_never_meet_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(run={"windows": 12}, federation={"bound": 4.0})
    rank = Rank(monkeypatch, config, trio(config))
    assert rank.run() == 12
    assert not rank.problems and not any(status.tally.bounded for status in rank.statuses)


@pytest.mark.parametrize("lockstep_forwards", [False, True])
@pytest.mark.parametrize("on_loss", ["continue", "wait"])
def test_legal_values_that_spoil_the_bodys_results_cost_their_client_alone(
    monkeypatch: pytest.MonkeyPatch, on_loss: str, lockstep_forwards: bool
) -> None:
    config = run_config(clients=SOME | {"on_loss": on_loss, "join_timeout": 1.0}, federation={"bound": None})
    rank = Rank(monkeypatch, config, trio(config, larger("activations", 2e5)), lockstep_forwards=lockstep_forwards)
    rank.engine.most = 1e5
    if on_loss == "wait":
        with pytest.raises(RunError, match="client bo: what it sent makes results that are not finite; 2 of 3"):
            rank.run()
        return
    assert rank.run() == 2
    ada, bo, cy = rank.clients
    assert ada.windows_stepped == cy.windows_stepped == [0, 1]
    assert rank.problems == ["client bo: what it sent makes results that are not finite"] == [bo.refusal]
    left_out = rank.engine.left_out
    assert left_out and all(spans for _, spans in left_out), "its rows alone, before the backward"
    assert rank.statuses[0].tally.lost_masked_tokens == 5 and rank.statuses[1].tally.lost_masked_tokens == 0


@pytest.mark.parametrize("lockstep_forwards", [False, True])
@pytest.mark.parametrize("clients", [SOME, {"expected": 3, "minimum": 3}, {"on_loss": "wait"}])
def test_a_body_that_makes_nothing_finite_is_the_runs_own_fault(
    monkeypatch: pytest.MonkeyPatch, clients: dict[str, Any], lockstep_forwards: bool
) -> None:
    """At the latest when the ranks meet, before a run with too few clients waits or ends."""
    config = run_config(clients=clients)
    rank = Rank(monkeypatch, config, trio(config), lockstep_forwards=lockstep_forwards)
    rank.engine.most = 0.0
    with pytest.raises(NotFinite, match=r"lower optimizer\.lr"):
        rank.run()
    assert (not rank.engine.steps and not rank.engine.saved) or lockstep_forwards


@pytest.mark.parametrize("on_loss", ["continue", "wait"])
def test_a_gradient_that_is_lost_is_told_and_its_tokens_are_not_trained(
    monkeypatch: pytest.MonkeyPatch, on_loss: str
) -> None:
    config = run_config(clients={"on_loss": on_loss})
    rank = Rank(monkeypatch, config, trio(config))
    step = rank.engine.step

    def lost_at_first(*arguments: float) -> float:
        rank.engine.lost_gradient = not rank.engine.steps
        return step(*arguments)

    monkeypatch.setattr(rank.engine, "step", lost_at_first)
    assert rank.run() == 2
    assert rank.problems == ["the body's gradient of window 0 was not finite on a rank, and is left out"]
    masked = sum(length // 2 for client in rank.clients for length in client.lengths)
    assert [status.tally.lost_masked_tokens for status in rank.statuses] == [masked, 0]
