"""The benchmark's record holds both ways' numbers, and a second start runs neither again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.glue import benchmark
from benchmarks.glue.__main__ import main
from fedbert_ds.config import ModelSection
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.tokenizer import train_wordpiece
from fedbert_ds.model.checkpoint import build_model

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    tokenizer = train_wordpiece([Article("one", " ".join(WORDS * 9))], 100)
    section = ModelSection(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=128)
    build_model(section, len(tokenizer), tokenizer.pad_token_id, 0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    draw = np.random.default_rng(0)
    lines = [f"{' '.join(draw.choice(WORDS, 1 + number % 7))}\t{number % 2}" for number in range(70)]
    (tmp_path / "data" / "SST-2").mkdir(parents=True)
    for name in ("train", "dev"):
        (tmp_path / "data" / "SST-2" / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines, ""]))
    return [
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "data"),
        "--tasks",
        "SST-2",
        "--seeds",
        "0",
        "1",
    ]


def test_both_ways_are_recorded_and_equal(inputs: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    arguments = [*inputs, "--out", str(tmp_path / "record.json"), "--work", str(tmp_path / "work"), "--epochs", "2"]
    arguments += ["--learning-rate", "3e-4"]
    main(arguments)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["recipes"]["SST-2"]["learning_rate"] == 3e-4
    assert [(row["task"], row["seed"], row["train_examples"]) for row in record["rows"]] == [
        ("SST-2", 0, 70),
        ("SST-2", 1, 70),
    ]
    for row in record["rows"]:
        assert row["largest_difference"] < 1e-6
        assert len(row["train_loss"]) == 2
        assert row["train_loss"] == pytest.approx(row["plain_train_loss"], abs=1e-6)
    assert "| SST-2 | accuracy | 0 | 70 |" in capsys.readouterr().out
    monkeypatch.setattr(benchmark, "plain_run", None)
    main(arguments)
    assert json.loads((tmp_path / "record.json").read_text())["rows"] == record["rows"]
