"""Evaluations of a rank: whoever is lost meanwhile, the run goes on as it would have without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from unit.server.bad_clients import trio
from unit.server.fake_client import GONE, Alter, FakeClient
from unit.server.fakes import Rank, run_config

from fedbert_ds.config import RunConfig
from fedbert_ds.telemetry.evaluations import Evaluation, HeldOutLoss
from fedbert_ds.wire import fedbert_pb2 as pb

STEPS = {"name": "sgd", "lr": 0.5, "schedule": "constant", "weight_decay": 0.0}
SYNCHRONOUS, PARALLEL = {"federation": {"mode": "synchronous"}}, {"federation": {"mode": "parallel"}}
MODES: dict[str, dict[str, Any]] = {
    "synchronous": SYNCHRONOUS,
    "parallel": PARALLEL,
    "rows": {**SYNCHRONOUS, "cut": "rows"},
    "whole": {**PARALLEL, "cut": "whole"},
    "sequential": {"federation": {"mode": "sequential", "average_every": 2}},
}


def config_with(mode: str = "synchronous", every: int | None = 1, on_loss: str = "continue", **run: Any) -> RunConfig:
    return run_config(
        run={"windows": 4, "save_every": 2, "evaluate_every": every, **run},
        data={"client_held_out": 0.1},
        clients={"on_loss": on_loss, "join_timeout": 60.0, "minimum": 1 if on_loss == "continue" else 3},
        optimizer=STEPS,
        **MODES[mode],
    )


def told(rank: Rank) -> list[tuple[int, float, tuple[str, ...]]]:
    return [(one.window, one.loss, one.missing) for one in rank.served.evaluations.history]


def trained(rank: Rank) -> list[tuple[int, int, float, int]]:
    tallies = [status.tally for status in rank.statuses]
    return [(tally.tokens, tally.masked_tokens, tally.loss_sum, tally.lost_masked_tokens) for tally in tallies]


def references_equal(one: Rank, other: Rank) -> bool:
    ours, theirs = (rank.served.aggregator.reference().weights for rank in (one, other))
    return all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lockstep", [False, True])
def test_every_client_is_asked_when_it_is_due_and_training_is_the_same(
    monkeypatch: pytest.MonkeyPatch, mode: str, lockstep: bool
) -> None:
    without = Rank(monkeypatch, config_with(mode, None), trio(config_with(mode)), lockstep_forwards=lockstep)
    assert without.run() == 4 and told(without) == []
    rank = Rank(monkeypatch, config_with(mode, 2), trio(config_with(mode)), lockstep_forwards=lockstep)
    assert rank.run() == 4
    masked = sum(length // 2 for client in rank.clients for length in client.lengths)
    assert told(rank) == [(window, pytest.approx(3.0 + 3 * window / masked), ()) for window in (2, 4)]
    assert trained(rank) == trained(without) and references_equal(rank, without)
    assert rank.engine.steps == without.engine.steps and rank.engine.backwards == without.engine.backwards
    assert not rank.problems


def loses_the_connection(number: int) -> Alter:
    """At the `number`th message of an evaluation."""
    seen = iter(range(10**6))

    def alter(_: int, message: pb.ClientMessage) -> list[pb.ClientMessage]:
        is_held_out = message.HasField("evaluated") or bool(message.activations.held_out_lengths)
        return [GONE if is_held_out and next(seen) == number else message]

    return alter


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", range(0, 12, 3))
def test_one_that_is_lost_meanwhile_is_named_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, mode: str, number: int
) -> None:
    config = config_with(mode, 2)
    rank = Rank(monkeypatch, config, trio(config, loses_the_connection(number)))
    assert rank.run() == 4
    per_evaluation = 4 if mode == "whole" else 8
    if number < per_evaluation:
        assert [missing for _, _, missing in told(rank)] == [("bo",), ()], "later it is not connected any more"
    elif number < 2 * per_evaluation:
        assert [missing for _, _, missing in told(rank)] == [(), ("bo",)]
    assert all(loss > 2.9 for _, loss, _ in told(rank)) and len(told(rank)) == 2


@pytest.mark.parametrize("mode", ["synchronous", "parallel", "whole"])
@pytest.mark.parametrize("number", range(0, 24, 2))
def test_a_run_that_waits_evaluates_again_and_ends_as_if_nobody_had_been_lost(
    monkeypatch: pytest.MonkeyPatch, mode: str, number: int
) -> None:
    config = config_with(mode, 1, "wait")
    undisturbed = Rank(monkeypatch, config, trio(config))
    assert undisturbed.run() == 4
    rank = Rank(monkeypatch, config, trio(config, loses_the_connection(number)))

    def comes_back(name: str) -> None:
        fresh = FakeClient(name, config, rank.endpoint.clients[name].lengths)
        fresh.states = rank.endpoint.clients[name].states
        rank.endpoint.join(fresh, 5.0, saved_windows=sorted(fresh.states)[-2:])

    rank.endpoint.on_gone = comes_back
    assert rank.run() == 4
    assert told(rank) == told(undisturbed) and len(told(rank)) == 4
    assert trained(rank)[-4:] == trained(undisturbed)[-4:] and references_equal(rank, undisturbed)


@pytest.mark.parametrize("mode", ["synchronous", "whole"])
def test_one_that_says_nothing_is_gone_after_the_silence_timeout(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    def silent(_: int, message: pb.ClientMessage) -> list[pb.ClientMessage]:
        return [] if message.HasField("evaluated") else [message]

    config = config_with(mode, 3)
    rank = Rank(monkeypatch, config, trio(config, silent))
    assert rank.run() == 4
    assert [(window, missing) for window, _, missing in told(rank)] == [(3, ("bo",)), (4, ())]
    assert "client bo was silent for 300 s (clients.silence_timeout)" in rank.problems


@pytest.mark.parametrize("unasked", ["evaluated", "activations"])
def test_one_that_was_not_asked_is_refused_alone(monkeypatch: pytest.MonkeyPatch, unasked: str) -> None:
    extra = {
        "evaluated": pb.ClientMessage(evaluated=pb.Evaluated(window=0, last=True)),
        "activations": pb.ClientMessage(activations=pb.Activations(held_out_lengths=[3])),
    }[unasked]
    config = config_with("synchronous", None)
    rank = Rank(monkeypatch, config, trio(config, lambda number, message: [message, *[extra] * (number == 3)]))
    assert rank.run() == 4
    (problem,) = rank.problems
    assert "which was not asked for" in problem and "client bo" in problem


def losses_of(*losses: float) -> list[Evaluation]:
    return [Evaluation(number + 1, {"ada": HeldOutLoss(loss, 1)}) for number, loss in enumerate(losses)]


def test_a_run_ends_when_evaluations_are_no_better(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with("synchronous", 1, early_stopping_patience=2)  # each is worse than the one before
    rank = Rank(monkeypatch, config, trio(config))
    assert rank.run() == 3
    assert [window for window, _, _ in told(rank)] == [1, 2, 3]
    assert rank.engine.saved[-1] == 3, "what is handed over is saved"
