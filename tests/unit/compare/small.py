"""Text of two owners and a run file for it, small enough for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fedbert_ds.config import RunConfig
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.shards import write_shard
from fedbert_ds.run_file import parse_config
from fedbert_ds.server.prepare import prepare_text
from fedbert_ds.server.run_folder import RunFolder

SENTENCES = {
    "ward": "the patient of ward {n} has a fever and gets his dose at night ",
    "lab": "sample {n} of the lab is cold and its colour turns blue in the light ",
}
CLIENTS = ("client-00", "client-01")


def write_owners(folder: Path, articles: int = 10) -> list[str]:
    """A file of articles for each owner."""
    for name, sentence in SENTENCES.items():
        write_shard(
            folder / f"{name}.jsonl",
            [Article(f"{name} {n}", sentence.format(n=n) * 5) for n in range(articles)],
        )
    return [str(folder / f"{name}.jsonl") for name in SENTENCES]


def run_file(folder: Path, **sections: Any) -> Path:
    """A run file beside the owners' text, for two clients."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree(folder, **sections)))
    return path


def tree(folder: Path, **sections: Any) -> dict[str, Any]:
    """The run file's mapping."""
    (folder / "zero.json").write_text("{}")
    whole: dict[str, Any] = {
        "run": {"windows": 6, "seed": 3, "directory": str(folder / "run"), "evaluate_tokens": 400},
        "model": {"hidden_size": 16, "num_hidden_layers": 2, "dropout": 0.0, "max_position_embeddings": 32},
        "tokenizer": {"vocab_size": 90},
        "data": {"source": write_owners(folder), "shards": "source", "client_held_out": 0.2, "sequence_length": 24},
        "window": {"tokens": 200, "tokens_per_micro_batch": 96, "order": "fixed"},
        "optimizer": {"lr": 0.01},
        "body": {"deepspeed": str(folder / "zero.json")},
        "clients": {"expected": 2, "local": 2},
    }
    for section, values in sections.items():
        whole[section] = whole.get(section, {}) | values
    return whole


def prepared(folder: Path, **sections: Any) -> tuple[RunConfig, RunFolder]:
    """The run file as read, and the folder of its text."""
    config = parse_config(tree(folder, **sections), "test")
    text = RunFolder(folder / "text")
    text.path.mkdir()
    prepare_text(config, text)
    return config, text
