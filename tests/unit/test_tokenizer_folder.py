"""The tokenizer's folder: tests/unit/data/test_tokenizer.py tries it with every kind."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedbert_ds.tokenizer_folder import save_tokenizer


@pytest.mark.parametrize(
    ("saved", "expected"), [("TokenizersBackend", "PreTrainedTokenizerFast"), ("BertTokenizer", "BertTokenizer")]
)
def test_the_class_is_one_that_both_versions_have(tmp_path: Path, saved: str, expected: str) -> None:
    def save_pretrained(folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": saved, "mask_token": "[MASK]"}))

    tokenizer: Any = SimpleNamespace(save_pretrained=save_pretrained)
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config == {"tokenizer_class": expected, "mask_token": "[MASK]"}
