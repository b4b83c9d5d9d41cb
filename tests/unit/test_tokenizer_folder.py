"""The tokenizer's folder: tests/unit/data/test_tokenizer.py tries it with every kind."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedbert_ds.tokenizer_folder import save_tokenizer


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ({"tokenizer_class": "TokenizersBackend"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"tokenizer_class": "BertTokenizer"}, {"tokenizer_class": "BertTokenizer"}),
        ({"extra_special_tokens": ["[NAME]"]}, {"additional_special_tokens": ["[NAME]"]}),
        ({"extra_special_tokens": {"name_token": "[NAME]"}}, {"extra_special_tokens": {"name_token": "[NAME]"}}),
        ({"is_local": True, "local_files_only": True}, {}),
    ],
)
def test_what_is_written_is_what_both_versions_read(
    tmp_path: Path, saved: dict[str, Any], expected: dict[str, Any]
) -> None:
    def save_pretrained(folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text(json.dumps(saved | {"mask_token": "[MASK]"}))

    tokenizer: Any = SimpleNamespace(save_pretrained=save_pretrained)
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config == expected | {"mask_token": "[MASK]"}
