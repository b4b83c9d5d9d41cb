"""Articles to clients: hold some out, deal the rest, keep a client's share in a file."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedbert_ds.atomic_write import atomic_write
from fedbert_ds.data.corpus import Article, Item
from fedbert_ds.errors import DataError
from fedbert_ds.seeding import generator

_NUM_FEATURES = 512
_WORDS_READ = 300
_NUM_TOPICS = 10
_ROUNDS = 15


def hold_out(articles: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Split into (train, held_out), both in the order of `articles`; neither is empty.

    DataError for fewer than two articles.
    """
    if len(articles) < 2:
        raise DataError(
            f"{len(articles)} article cannot be both trained on and held out; put more in data.source, or use .jsonl"
        )
    count = min(max(1, round(share * len(articles))), len(articles) - 1)
    chosen = set(generator("hold-out", seed).permutation(len(articles))[:count].tolist())
    train = [article for index, article in enumerate(articles) if index not in chosen]
    return train, [article for index, article in enumerate(articles) if index in chosen]


def deal(
    articles: Sequence[Item], num_clients: int, how: Literal["equal", "size", "topic"], alpha: float, seed: int
) -> list[list[Item]]:
    """Deal every article to exactly one of `num_clients` shards by `seed`; none is empty.

    `equal`: counts that differ by at most one. `size`: counts in Dirichlet(alpha) proportions.
    `topic`: articles are clustered by their words, and each cluster is dealt in its own
    Dirichlet(alpha) proportions over the clients (Yurochkin et al. 2019), so that clients differ in
    subject; the smaller alpha, the more.

    DataError for fewer articles than clients.
    """
    if len(articles) < num_clients:
        raise DataError(
            f"{len(articles)} articles are too few for {num_clients} clients; lower clients.local or add to data.source"
        )
    random = generator("deal", how, seed)
    if how == "topic":
        topics = _topics([article.text for article in articles], random)
        groups = [np.flatnonzero(topics == topic) for topic in np.unique(topics)]
    else:
        groups = [np.arange(len(articles))]
    shards: list[list[int]] = [[] for _ in range(num_clients)]
    for group in groups:
        proportions = (
            np.full(num_clients, 1 / num_clients) if how == "equal" else random.dirichlet([alpha] * num_clients)
        )
        ends = np.rint(np.cumsum(proportions) * len(group)).astype(int)[:-1]
        for shard, part in zip(shards, np.split(random.permutation(group), ends), strict=True):
            shard.extend(part.tolist())
    for shard in shards:
        if not shard:
            shard.append(max(shards, key=len).pop())
    return [[articles[index] for index in sorted(shard)] for shard in shards]


def write_shard(path: Path, articles: Sequence[Article]) -> None:
    """Write articles as .jsonl, for `read_articles`; replaces a file whole."""
    write_rows(path, ({"title": article.title, "text": article.text} for article in articles))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as .jsonl; replaces a file whole."""
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _topics(texts: Sequence[str], random: np.random.Generator) -> np.ndarray:
    """Topic of each text [N], by spherical k-means on hashed words, seeded by `random`."""
    features = _word_features(texts)
    num_topics = min(_NUM_TOPICS, len(texts))
    centers = features[random.choice(len(texts), num_topics, replace=False)]
    topics = np.zeros(len(texts), dtype=np.int64)
    for _ in range(_ROUNDS):
        topics = np.argmax(features @ centers.T, axis=1)
        for topic in range(num_topics):
            members = features[topics == topic]
            if len(members):
                center = members.sum(axis=0)
                centers[topic] = center / max(float(np.linalg.norm(center)), 1e-12)
    return topics


def _word_features(texts: Sequence[str]) -> np.ndarray:
    """Unit rows [N, _NUM_FEATURES] float32: log-counts of a text's first words, less the mean's."""
    features = np.zeros((len(texts), _NUM_FEATURES), dtype=np.float32)
    for row, text in zip(features, texts, strict=True):
        words = re.findall(r"\w+", text[: 10 * _WORDS_READ].lower())[:_WORDS_READ]
        # crc32 is the same in every process; hash() is not.
        buckets = [zlib.crc32(word.encode("utf-8", "replace")) % _NUM_FEATURES for word in words]
        np.add.at(row, buckets, 1.0)
    features = np.log1p(features)
    features -= features.mean(axis=0)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
