"""The model that ranks agree on: prepared once, built alike by each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import BertForMaskedLM
from unit.server.fakes import FakeRankGroup

from fedbert_ds.config import RunConfig
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.shards import write_shard
from fedbert_ds.errors import ConfigError, DataError
from fedbert_ds.run_file import parse_config
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.server.run_model import build_model_of_run

SMALL = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 16}


def config_with(folder: Path, **sections: Any) -> RunConfig:
    write_shard(
        folder / "text.jsonl", [Article("", f"the {n} quick brown foxes run away from it " * 9) for n in "abcdef"]
    )
    tree: dict[str, Any] = {
        "run": {"directory": str(folder / "run")},
        "model": SMALL,
        "cut": "whole",
        "federation": {"mode": "parallel"},
        "tokenizer": {"vocab_size": 100},
        "data": {"source": [str(folder / "text.jsonl")], "sequence_length": 12},
        "clients": {"expected": 2, "local": 2},
    }
    return parse_config({**tree, **sections}, "test")


def built(config: RunConfig, resume: bool) -> Any:
    return build_model_of_run(config, resume, FakeRankGroup(), RunFolder(config.run.directory))  # type: ignore[arg-type]


def test_a_start_and_a_resume_build_the_same_run(tmp_path: Path) -> None:
    config = config_with(tmp_path)
    (model, half), (again, same) = built(config, resume=False), built(config, resume=True)
    assert model.prepared.run == again.prepared.run and model.prepared.tokenizer == again.prepared.tokenizer
    assert len(model.tokenizer) == model.config.vocab_size
    for (name, ours), (other, theirs) in zip(half.named_parameters(), same.named_parameters(), strict=True):
        assert name == other and ours.equal(theirs)


def test_a_model_without_positions_for_the_text_is_one_line(tmp_path: Path) -> None:
    """A checkpoint's table shows when it is loaded."""
    data = {"source": [str(tmp_path / "text.jsonl")], "sequence_length": 17}
    short, _ = built(config_with(tmp_path), resume=False)
    short.config.save_pretrained(tmp_path / "model")
    BertForMaskedLM(short.config).save_pretrained(tmp_path / "model")
    short.tokenizer.save_pretrained(tmp_path / "model")
    model = {"checkpoint": str(tmp_path / "model")}
    config = config_with(tmp_path, run={"directory": str(tmp_path / "other")}, model=model, tokenizer={}, data=data)
    with pytest.raises(ConfigError, match=r"data\.sequence_length 17 is longer than the model's position table, 16"):
        built(config, resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_a_start_that_fails_leaves_no_run_and_a_resume_takes_none_away(tmp_path: Path, resume: bool) -> None:
    config = config_with(tmp_path, data={"source": [str(tmp_path / "none.txt")], "sequence_length": 12})
    with pytest.raises(DataError, match=r"none\.txt: no such file or folder"):
        built(config, resume)
    assert RunFolder(config.run.directory).config.is_file() == resume
