"""Halves as files of two parties: their merge is the model that was cut; strangers do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

from fedbert_ds.config import ModelSection
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.tokenizer import train_wordpiece
from fedbert_ds.errors import ModelError
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import split
from fedbert_ds.model.halves import BODY, CLIENT_MODEL, merge_folders, write_body, write_client_model

CUT = '"embeddings"'


def written(folder: Path, window: int = 5) -> tuple[Path, Path, dict[str, Any]]:
    """(body's folder, client model's file, the whole model's state)."""
    tokenizer = train_wordpiece([Article("a", "some words of a text " * 5)], 64)
    section = ModelSection(hidden_size=8, num_attention_heads=2, max_position_embeddings=16)
    model = build_model(section, len(tokenizer), tokenizer.pad_token_id, seed=3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    half, body = split(model, "embeddings")
    weights = {name: parameter.detach() for name, parameter in half.named_parameters()}
    write_client_model(folder / CLIENT_MODEL, weights, model.config, CUT, window)
    body_weights = {name: parameter.detach() for name, parameter in body.named_parameters()}
    write_body(folder / "body", body_weights, model.config, CUT, 5, tokenizer)
    return folder / "body", folder / CLIENT_MODEL, state


def test_merged_halves_are_the_model_that_was_cut(tmp_path: Path) -> None:
    body, client_model, state = written(tmp_path)
    merge_folders(body, client_model, tmp_path / "hf")
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").state_dict()
    assert merged.keys() == state.keys() and all(torch.equal(merged[name], state[name]) for name in state)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_halves_of_two_ends_do_not_merge(tmp_path: Path) -> None:
    body, client_model, _ = written(tmp_path, window=4)
    with pytest.raises(ModelError, match="differ in window"):
        merge_folders(body, client_model, tmp_path / "hf")


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    body, client_model, _ = written(tmp_path)
    with pytest.raises(ModelError, match="exists; give --out a new folder"):
        merge_folders(body, client_model, tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut short", "of something else"])
def test_a_file_that_is_no_half_is_named(tmp_path: Path, damage: str) -> None:
    body, client_model, _ = written(tmp_path)
    path = body / BODY
    content = path.read_bytes()
    path.unlink()
    if damage == "cut short":
        path.write_bytes(content[:100])
    elif damage == "of something else":
        import safetensors.torch

        path.write_bytes(safetensors.torch.save({"a": torch.ones(2)}))
    with pytest.raises(ModelError, match=r"body\.safetensors: no half of a run"):
        merge_folders(body, client_model, tmp_path / "hf")
