"""What no system trained: there when it should be, and from the seed."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit.compare.small import prepared

from fedbert_ds.compare.baselines import BEFORE, NOT_PRETRAINED, WORD_FREQUENCY, baselines
from fedbert_ds.compare.held_out import held_out_batches, losses, overall, word_frequency
from fedbert_ds.data.tokenizer import load_tokenizer
from fedbert_ds.model.checkpoint import build_model


def test_from_scratch(tmp_path: Path) -> None:
    config, text = prepared(tmp_path)
    batches = held_out_batches(config, text)
    assert baselines(config, text, batches, with_model=False) == {
        WORD_FREQUENCY: (word_frequency(config, text, batches), None)
    }
    found, folder = baselines(config, text, batches, with_model=True)[NOT_PRETRAINED]
    tokenizer = load_tokenizer(str(folder))
    model = build_model(config.model, len(tokenizer), tokenizer.pad_token_id, config.run.seed)
    assert found == losses(model, batches), "the weights that every system begins with"


def test_from_a_checkpoint(tmp_path: Path) -> None:
    config, text = prepared(tmp_path)
    tokenizer = load_tokenizer(str(text.tokenizer))
    start = build_model(config.model, len(tokenizer), tokenizer.pad_token_id, 77)
    start.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    model = config.model.model_copy(update={"checkpoint": str(tmp_path / "start")})
    config = config.model_copy(update={"model": model})
    batches = held_out_batches(config, text)
    found = baselines(config, text, batches, with_model=True)
    assert list(found) == [WORD_FREQUENCY, BEFORE, NOT_PRETRAINED]
    assert found[BEFORE] == (losses(start, batches), str(tmp_path / "start"))
    assert overall(found[NOT_PRETRAINED][0]) != pytest.approx(overall(found[BEFORE][0]), abs=1e-4)
