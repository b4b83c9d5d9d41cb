"""A small BERT with its tokenizer, as a masked LM, and GLUE's files beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from unit.tasks.glue_files import write_glue

from fedbert_ds.config import ModelSection
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.tokenizer import train_wordpiece
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.tasks.glue_tasks import GLUE

WORDS = [Article("one", "the quick brown fox jumps over the lazy dog and runs away from it in the rain " * 8)]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_wordpiece(WORDS, 160)
    section = ModelSection(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=32, initializer_range=0.3
    )
    model = build_model(section, len(tokenizer), tokenizer.pad_token_id, 0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def glue_files(tmp_path: Path) -> Path:
    return write_glue(tmp_path / "glue", *GLUE)


@pytest.fixture(autouse=True)
def cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
