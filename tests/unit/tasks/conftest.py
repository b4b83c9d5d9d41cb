"""A small WordPiece vocabulary."""

from __future__ import annotations

from typing import Any

import pytest

from fedbert_ds.data.corpus import Article
from fedbert_ds.data.tokenizer import train_wordpiece

WORDS = [
    "the",
    "bank",
    "of",
    "england",
    "and",
    "a",
    "river",
    "run",
    "to",
    "peter",
    "smith",
    "in",
    "london",
    "said",
    "that",
    "rates",
    "fall",
    "again",
    "today",
]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_wordpiece([Article("words", " ".join(WORDS * 3))], 120)
