"""A tokenizer in a folder, as transformers 4 and 5 load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fedbert_ds.atomic_write import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a tokenizer so that transformers 4 and 5 load it, from tokenizer.json alone."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # Of a tokenizer that came as bytes transformers 5 names a class that transformers 4 has not.
    if config.get("tokenizer_class") == "TokenizersBackend":
        write_text(path, json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
