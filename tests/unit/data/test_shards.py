"""Shards partition the articles, follow from the seed, and differ between clients as asked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbert_ds.data.corpus import Article, read_articles
from fedbert_ds.data.shards import deal, hold_out, write_shard
from fedbert_ds.errors import DataError

HOW = ("equal", "size", "topic")


def numbered(count: int) -> list[Article]:
    # Some texts are equal or without a word, as in real collections.
    return [Article(str(number), f"word{number % 7} " * (number % 5)) for number in range(count)]


@settings(max_examples=80)
@given(
    how=st.sampled_from(HOW),
    num_clients=st.integers(1, 9),
    extra=st.integers(0, 40),
    alpha=st.sampled_from([1e-3, 0.1, 2.0, 1e3]),
    seed=st.integers(-(2**63), 2**63),
)
def test_every_article_is_dealt_once_and_no_shard_is_empty(
    how: str, num_clients: int, extra: int, alpha: float, seed: int
) -> None:
    articles = numbered(num_clients + extra)
    shards = deal(articles, num_clients, how, alpha, seed)  # type: ignore[arg-type]
    assert len(shards) == num_clients and all(shards)
    assert Counter(article for shard in shards for article in shard) == Counter(articles)
    assert shards == deal(articles, num_clients, how, alpha, seed)  # type: ignore[arg-type]
    if how == "equal":
        sizes = [len(shard) for shard in shards]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("how", HOW)
def test_another_seed_deals_otherwise(how: str) -> None:
    assert deal(numbered(100), 4, how, 2.0, 1) != deal(numbered(100), 4, how, 2.0, 2)  # type: ignore[arg-type]


def test_smaller_alpha_is_more_unequal() -> None:
    def spread(alpha: float) -> float:
        return float(
            np.mean([np.std([len(s) for s in deal(numbered(400), 8, "size", alpha, seed)]) for seed in range(20)])
        )

    assert spread(100.0) < spread(2.0) < spread(0.1)


def test_topic_shards_differ_in_words() -> None:
    random = np.random.default_rng(0)
    topics = {
        "medicine": ["patient", "dose", "clinic", "fever", "nurse", "trial"],
        "law": ["court", "judge", "appeal", "statute", "claim", "counsel"],
        "sport": ["match", "goal", "league", "coach", "team", "score"],
    }
    articles = [
        Article(topic, " ".join(random.choice(["the", "of", "a", *words, *words], size=80)))
        for topic, words in topics.items()
        for _ in range(60)
    ]

    def purity(alpha: float) -> float:
        """Share of articles of a shard's commonest topic, over ten seeds; 1/3 is an even mix."""
        shards = [shard for seed in range(10) for shard in deal(articles, 3, "topic", alpha, seed)]
        largest = [Counter(article.title for article in shard).most_common(1)[0][1] for shard in shards]
        return sum(largest) / (10 * len(articles))

    assert purity(0.05) > 0.5 > 0.4 > purity(1000.0)


@pytest.mark.parametrize("how", HOW)
def test_too_few_articles_for_the_clients(how: str) -> None:
    with pytest.raises(DataError, match="3 articles are too few for 4 clients"):
        deal(numbered(3), 4, how, 2.0, 0)  # type: ignore[arg-type]


@settings(max_examples=50)
@given(count=st.integers(2, 200), share=st.floats(0.001, 0.999), seed=st.integers(0, 5))
def test_hold_out_keeps_the_share_apart(count: int, share: float, seed: int) -> None:
    articles = numbered(count)
    train, held_out = hold_out(articles, share, seed)
    assert (train, held_out) == hold_out(articles, share, seed)
    assert sorted([*train, *held_out], key=lambda article: int(article.title)) == articles
    assert len(held_out) == min(max(1, round(share * count)), count - 1)
    assert [int(a.title) for a in train] == sorted(int(a.title) for a in train)


def test_one_article_cannot_be_held_out() -> None:
    with pytest.raises(DataError, match="1 article cannot be both"):
        hold_out(numbered(1), 0.5, 0)


def test_writing_a_shard_again_replaces_it(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.jsonl", numbered(9))
    write_shard(tmp_path / "0.jsonl", [Article("a", "b")])
    assert list(read_articles([str(tmp_path / "0.jsonl")])) == [Article("a", "b")]
    assert [path.name for path in tmp_path.iterdir()] == ["0.jsonl"]
