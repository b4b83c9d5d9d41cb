"""A client alone: the lowest loss counts, its model is kept, and patience ends it early."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from unit.compare.small import prepared

from fedbert_ds.compare import alone
from fedbert_ds.compare.alone import best_of, read_evaluations, train_alone
from fedbert_ds.compare.centralized import Centralized, shards_of
from fedbert_ds.compare.held_out import held_out_batch, loss_on
from fedbert_ds.data.tokenizer import load_tokenizer
from fedbert_ds.errors import RunError
from fedbert_ds.evaluation.masked_lm import load_masked_lm
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.telemetry.evaluations import HeldOutLoss


def told(*losses: float) -> list[dict[str, Any]]:
    return [{"loss": loss} for loss in losses]


def test_the_lowest_loss_and_the_first_of_equals() -> None:
    assert best_of(told(3.0, 2.0, 2.5)) == 1
    assert best_of(told(3.0, 2.0, 2.0)) == 1
    assert best_of(told(math.nan, 2.0)) == 1
    assert best_of(told(math.nan, math.nan)) == 0


def test_it_is_the_centralized_trainer_on_one_clients_text(tmp_path: Path) -> None:
    config, text = prepared(tmp_path)
    train_alone(config, text, "client-01", every=2)
    run = RunFolder(config.run.directory)
    evaluations = read_evaluations(run)
    assert [one["windows"] for one in evaluations] == [2, 4, 6]
    tokenizer = load_tokenizer(str(text.tokenizer))
    trainer = Centralized(config, tokenizer, {"client-01": shards_of(text)["client-01"]})
    batch = held_out_batch(config, text, "client-01", tokenizer)
    assert trainer.shares == {"client-01": config.window.tokens}, "as many tokens as the whole federation"
    weights, losses = [], []
    for window in range(6):
        trainer.train_window(window)
        weights.append({name: one.clone() for name, one in trainer.model.state_dict().items()})
        losses.append(loss_on(trainer.model, batch).loss)
    assert [one["loss"] for one in evaluations] == losses[1::2]
    best = weights[2 * best_of(evaluations) + 1]
    kept = load_masked_lm(str(run.model), 0)
    assert all(torch.equal(one, best[name]) for name, one in kept.state_dict().items())
    assert loss_on(kept, batch).loss == pytest.approx(min(losses[1::2]), rel=1e-6)
    with pytest.raises(RunError, match="holds a run already"):
        train_alone(config, text, "client-01", every=2)


@pytest.mark.parametrize(("patience", "trained"), [(None, 6), (1, 3), (2, 6)])
def test_the_best_model_is_kept_when_the_loss_rises_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: int | None, trained: int
) -> None:
    config, text = prepared(tmp_path)
    rising = iter([5.0, 4.0, 4.5, 3.5, 3.6, 3.7])
    seen: list[dict[str, torch.Tensor]] = []

    def loss_of(model: Any, batch: Any) -> HeldOutLoss:
        seen.append({name: one.clone() for name, one in model.state_dict().items()})
        return HeldOutLoss(next(rising) * 10, 10)

    monkeypatch.setattr(alone, "loss_on", loss_of)
    train_alone(config, text, "client-00", every=1, patience=patience)
    run = RunFolder(config.run.directory)
    assert len(read_evaluations(run)) == trained == len((run.metrics).read_text().splitlines())
    kept = load_masked_lm(str(run.model), 0).state_dict()
    best = seen[best_of(read_evaluations(run))]
    assert all(torch.equal(one, best[name]) for name, one in kept.items())


def test_with_its_share_it_draws_the_very_batches_of_the_federation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, text = prepared(tmp_path)
    tokenizer = load_tokenizer(str(text.tokenizer))
    federation = Centralized(config, tokenizer, shards_of(text))
    expected = [federation.streams["client-01"].next_batch(w, federation.shares["client-01"]) for w in range(6)]
    drawn: list[Any] = []
    train = Centralized.accumulate

    def watched(self: Centralized, client: str, window: int, batch: Any, masked_tokens: int) -> float:
        drawn.append(batch)
        assert client == "client-01" and masked_tokens == len(batch.labels)
        return train(self, client, window, batch, masked_tokens)

    monkeypatch.setattr(Centralized, "accumulate", watched)
    train_alone(config, text, "client-01", every=3, share=True)
    assert len(drawn) == 6 and sum(len(batch.input_ids) for batch in drawn) < 6 * config.window.tokens
    for mine, theirs in zip(drawn, expected, strict=True):
        assert torch.equal(mine.input_ids, theirs.input_ids) and torch.equal(mine.labels, theirs.labels)


def test_as_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from unit.compare.small import run_file

    _, text = prepared(tmp_path)
    path, threads = run_file(tmp_path), torch.get_num_threads()
    try:
        alone.main(["--config", str(path), "--text", str(text.path), "--client", "client-00", "--every", "3"])
    finally:
        torch.set_num_threads(threads)
    assert "MFLOP per token" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / alone.EVALUATIONS).read_text())[-1]["windows"] == 6
