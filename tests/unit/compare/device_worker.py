"""Trains a whole model by plain code on a stand-in for a GPU; prints the losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fake_device
import torch
import yaml

from fedbert_ds.compare.centralized import Centralized, shards_of
from fedbert_ds.data.tokenizer import load_tokenizer
from fedbert_ds.run_file import parse_config
from fedbert_ds.server.run_folder import RunFolder


def main(run_file: Path, text: Path) -> None:
    """Train three windows."""
    torch.set_num_threads(1)
    kept = fake_device.install()
    config, folder = parse_config(yaml.safe_load(run_file.read_text()), "test"), RunFolder(text)
    trainer = Centralized(config, load_tokenizer(str(folder.tokenizer)), shards_of(folder), f"{fake_device.NAME}:0")
    assert {parameter.device.type for parameter in trainer.model.parameters()} == {fake_device.NAME}
    print(json.dumps([trainer.train_window(window).loss for window in range(3)]))
    del kept


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
