"""Real mixes of sequence lengths: of the sentences, or of the whole articles, of English text."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fedbert_ds.data.corpus import Article, read_articles
from fedbert_ds.data.masking import encode
from fedbert_ds.data.tokenizer import train_wordpiece

VOCABULARY = 30_000
"""Word pieces trained on the text itself, about as many as BERT has; a short text yields fewer."""

_PARAGRAPH_END = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[\"'(\[]?[A-Z])")


def sentence_lengths(source: str, longest: int = 512) -> list[int]:
    """Tokens of every sentence in order, [CLS] and [SEP] included; longer ones are cut in pieces.

    `source` is one of `data.source`'s (`python-docs`, a file, a folder, `hub:NAME`). DataError if
    it cannot be read.
    """
    articles = list(read_articles([source]))
    return _lengths(
        articles, [Article(article.title, text) for article in articles for text in sentences(article.text)], longest
    )


def article_lengths(source: str, longest: int = 512) -> list[int]:
    """As `sentence_lengths`, of whole articles: pieces of `longest`, and a rest of each article."""
    articles = list(read_articles([source]))
    return _lengths(articles, articles, longest)


def sentences(text: str) -> Iterator[str]:
    """Sentences, each on one line: split at blank lines, `.`, `!` or `?` before a capital."""
    for paragraph in _PARAGRAPH_END.split(text):
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            if sentence:
                yield sentence


def _lengths(articles: list[Article], texts: list[Article], longest: int) -> list[int]:
    lengths: list[int] = encode(texts, train_wordpiece(articles, VOCABULARY), longest).lengths.tolist()
    return lengths
