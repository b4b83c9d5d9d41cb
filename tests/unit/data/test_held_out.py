"""A client's held-out text: disjoint, stable when text is added, masked alike every time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.data.corpus import Article
from fedbert_ds.data.held_out import evaluation_batch, keep_apart
from fedbert_ds.data.masking import encode
from fedbert_ds.data.tokenizer import train_wordpiece
from fedbert_ds.errors import DataError

WORDS = ["ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "zu"]


def articles_of(count: int) -> list[Article]:
    return [Article(str(n), " ".join(WORDS[(n + k) % 15] for k in range(5 + n % 30))) for n in range(count)]


@given(st.integers(2, 300), st.floats(0.001, 0.999), st.integers(0, 50))
def test_both_parts_have_text_and_more_text_behind_it_changes_neither(count: int, share: float, added: int) -> None:
    articles = articles_of(count + added)
    train, held_out = keep_apart(articles[:count], share)
    assert train and held_out
    assert sorted(train + held_out, key=lambda article: int(article.title)) == articles[:count]
    more_train, more_held_out = keep_apart(articles, share)
    assert more_train[: len(train)] == train and more_held_out[: len(held_out)] == held_out
    assert len(held_out) <= 1 + share * count


def test_without_a_share_nothing_is_held_out() -> None:
    assert keep_apart(articles_of(1), 0.0) == (articles_of(1), [])


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(DataError, match="1 article cannot be both"):
        keep_apart(articles_of(1), 0.1)
    with pytest.raises(DataError, match="leaves nothing to train on"):
        keep_apart(articles_of(3), 1.0)


def test_the_batch_is_the_text_with_tokens_hidden_and_within_its_bound() -> None:
    articles = articles_of(60)
    tokenizer = train_wordpiece(articles, 64)
    text = encode(articles, tokenizer, 16)

    def batch_of(max_tokens: int, client: str = "ada"):
        return evaluation_batch(
            text, tokenizer, mask_probability=0.3, whole_word=False, seed=4, client=client, max_tokens=max_tokens
        )

    whole = batch_of(10**6)
    assert whole.lengths == text.lengths.tolist()
    restored = whole.input_ids.clone()
    restored[whole.masked_positions] = whole.labels
    assert torch.equal(restored.int(), text.tokens)
    assert (whole.input_ids != restored).any(), "nothing was hidden"
    again = batch_of(10**6)
    assert torch.equal(again.input_ids, whole.input_ids) and torch.equal(again.labels, whole.labels)
    assert not torch.equal(batch_of(10**6, "bo").input_ids, whole.input_ids)
    small = batch_of(200)
    assert 100 < sum(small.lengths) < 300
    assert len(batch_of(1).lengths) == 1
