"""The two halves of a finished run as files of two parties, and their merge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedbert_ds.atomic_write import atomic_write, write_text
from fedbert_ds.errors import ModelError
from fedbert_ds.model.checkpoint import config_from_json, config_to_json, quiet_transformers, save_merged
from fedbert_ds.tokenizer_folder import save_tokenizer

CLIENT_MODEL = "client_model.safetensors"
BODY = "body.safetensors"


def write_client_model(path: Path, weights: Mapping[str, Tensor], hf_config: Any, cut: str, window: int) -> None:
    """Write a client model, fp32 by Hugging Face name, as it is before `window`; whole or not at
    all. `cut` is JSON.
    """
    _write(path, weights, {"config": config_to_json(hf_config), "cut": cut, "window": str(window)})


def write_body(
    folder: Path, weights: Mapping[str, Tensor], hf_config: Any, cut: str, window: int, tokenizer: Any
) -> None:
    """Write a body, as `write_client_model`, with its model's config and tokenizer beside it."""
    _write(folder / BODY, weights, {"config": config_to_json(hf_config), "cut": cut, "window": str(window)})
    write_text(folder / "config.json", config_to_json(hf_config))
    with quiet_transformers():
        save_tokenizer(tokenizer, folder)


def merge_folders(body: Path, client_model: Path, out: Path) -> None:
    """Write the whole model, a Hugging Face folder, from a body's folder and a client model's file.

    Raises ModelError if a file is missing or damaged, if the halves are not of one run's end, or if
    `out` exists.
    """
    from transformers import AutoTokenizer

    if out.exists():
        raise ModelError(f"{out}: exists; give --out a new folder")
    body_state, body_facts = _read(body / BODY)
    client_state, client_facts = _read(client_model)
    for key in ("config", "cut", "window"):
        if body_facts.get(key) != client_facts.get(key):
            raise ModelError(f"{client_model} and {body / BODY} differ in {key}; give the halves of one run's end")
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(body, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{body}: holds no tokenizer; give the folder that the server wrote") from error
    save_merged(out, config_from_json(body_facts["config"]), client_state, body_state, tokenizer)


def _write(path: Path, weights: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with atomic_write(path) as partial:
        partial.write_bytes(safetensors.torch.save(tensors, {"half": json.dumps(facts)}))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["half"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path}: no half of a run ({type(error).__name__}); give the file of a finished run"
        ) from error
    return tensors, facts
