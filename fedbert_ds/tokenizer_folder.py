"""A tokenizer in a folder, as transformers 4 and 5 load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbert_ds.atomic_write import write_text
from fedbert_ds.errors import writes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a tokenizer so that transformers 4 and 5 load it, from tokenizer.json alone. RunError
    where the disk takes no more.
    """
    with writes(folder):
        tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    readable = _readable_by_both(config)
    if readable != config:
        write_text(path, json.dumps(readable, indent=2) + "\n")


def _readable_by_both(config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json as transformers 4 writes it where that of 5 differs."""
    config = dict(config)
    # Of a tokenizer that came as bytes transformers 5 names a class that transformers 4 has not.
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Where 4 expects names with their tokens, 5 has a list of tokens; it reads the older key, too.
    if isinstance(extra := config.get("extra_special_tokens"), list):
        del config["extra_special_tokens"]
        config["additional_special_tokens"] = extra
    # How it was read here says nothing to who reads it next.
    for of_this_process in ("is_local", "local_files_only"):
        config.pop(of_this_process, None)
    return config
