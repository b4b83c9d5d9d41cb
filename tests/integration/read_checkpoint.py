"""A program for any version of transformers: what folders say of a text, as JSON.

`python read_checkpoint.py TEXT FOLDER...` prints by folder the tokenizer's class and what it makes
of TEXT, and, where there is a model, its logits for that.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForMaskedLM, AutoTokenizer


def reading(folder: Path, text: str) -> dict[str, Any]:
    """One folder's answers; logits [tokens, words] as lists."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    found = {
        "class": type(tokenizer).__name__,
        "ids": ids,
        "special": sorted(tokenizer.all_special_ids),
        "mask": tokenizer.mask_token_id,
        "text": tokenizer.decode(ids),
    }
    if (folder / "config.json").is_file():
        model, loading = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
        found["missing"] = sorted(map(str, (*loading["missing_keys"], *loading["unexpected_keys"])))
        with torch.no_grad():
            found["logits"] = model.eval()(torch.tensor([ids])).logits[0].tolist()
    return found


if __name__ == "__main__":
    told = {folder: reading(Path(folder), sys.argv[1]) for folder in sys.argv[2:]}
    print(json.dumps({"version": transformers.__version__, "folders": told}))
