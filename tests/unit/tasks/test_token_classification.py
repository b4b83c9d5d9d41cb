"""Labels of words: none is lost or moved, and entities are those that seqeval finds."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities

from fedbert_ds.errors import DataError
from fedbert_ds.tasks.examples import LabelledWords
from fedbert_ds.tasks.token_classification import TokenClassification, entities

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
TASK = TokenClassification(LABELS)
TAGS = st.lists(st.sampled_from(LABELS), min_size=1, max_size=12)


@given(TAGS)
def test_entities_are_seqevals(tags: list[str]) -> None:
    assert list(entities(tags)) == [(kind, first, last + 1) for kind, first, last in get_entities(tags)]


def test_words_without_a_scheme_are_entities_of_their_own() -> None:
    assert list(entities(["DRUG", "DRUG", "O", "DOSE"])) == [("DRUG", 0, 1), ("DRUG", 1, 2), ("DOSE", 3, 4)]
    assert list(entities(["O", "O"])) == []


@given(st.lists(TAGS.flatmap(lambda tags: st.tuples(st.just(tags), st.permutations(tags))), min_size=1, max_size=5))
def test_measures_of_added_counts_are_seqevals(sentences: list[tuple[list[str], list[str]]]) -> None:
    counts = [0.0] * TASK.num_counts
    for have, told in sentences:
        scores = torch.nn.functional.one_hot(torch.tensor([LABELS.index(tag) for tag in told]), len(LABELS)).float()
        part = TASK.counts(scores, torch.tensor([LABELS.index(tag) for tag in have]), [0, len(have)])
        counts = [a + b for a, b in zip(counts, part, strict=True)]
    have, told = ([one[side] for one in sentences] for side in (0, 1))
    measures = TASK.measures(counts)
    for name, score in {"f1": f1_score, "precision": precision_score, "recall": recall_score}.items():
        assert measures[name] == pytest.approx(score(have, told, zero_division=0)), name
    right = sum(a == b for one in sentences for a, b in zip(*one, strict=True))
    assert measures["accuracy"] == pytest.approx(right / sum(len(tags) for tags in have))


def test_an_entity_does_not_reach_into_the_next_sentence() -> None:
    tags = torch.tensor([1, 2, 2, 0])
    scores = torch.nn.functional.one_hot(tags, len(LABELS)).float()
    assert TASK.counts(scores, tags, [0, 4])[:3] == [1, 1, 1]
    assert TASK.counts(scores, tags, [0, 2, 4])[:3] == [2, 2, 2]


@given(data=st.data())
def test_every_label_stays_with_its_word(tokenizer: Any, data: Any) -> None:
    """However long a sentence is, and however short sequences are."""
    word = st.sampled_from(["the", "bank", "england", "London's", "unbelievable", "[MASK]", "x"])
    words = data.draw(st.lists(word, min_size=1, max_size=30))
    labels = tuple(data.draw(st.integers(0, 4)) for _ in words)
    length = data.draw(st.integers(8, 24))
    encoded = TASK.encode([LabelledWords(tuple(words), labels)], tokenizer, length)
    assert encoded.labels.tolist() == list(labels)
    assert int(encoded.text.lengths.max()) <= length
    tokens = encoded.text.tokens.tolist()
    for start, end in pairwise(encoded.text.offsets.tolist()):
        assert tokens[start] == tokenizer.cls_token_id and tokens[end - 1] == tokenizer.sep_token_id
    ends = [*encoded.positions.tolist()[1:], len(tokens)]
    for place, end, text in zip(encoded.positions.tolist(), ends, words, strict=True):
        pieces = [token for token in tokens[place:end] if token not in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
        plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert pieces == plain[: length - 2]


def test_pieces_are_those_of_transformers(tokenizer: Any) -> None:
    words = ("peter", "said", "rates", "unfallable")
    batch = TASK.encode([LabelledWords(words, (1, 0, 0, 3))], tokenizer, 64).batch([0])
    plain = tokenizer(list(words), is_split_into_words=True)
    assert batch.input_ids.tolist() == plain["input_ids"]
    firsts = [plain.word_ids().index(number) for number in range(len(words))]
    assert batch.masked_positions.tolist() == firsts


def test_an_example_survives_its_row() -> None:
    example = LabelledWords(("Peter", "came"), (1, 0))
    assert TASK.example(TASK.row(example), TASK.columns, "here") == example
    assert TASK.example({"tokens": ["Peter", "came"], "tags": ["B-PER", "O"]}, TASK.columns, "here") == example


@pytest.mark.parametrize(
    ("words", "tags", "message"),
    [
        ("Peter came", ["O"], "column 'tokens' is no list"),
        (["Peter"], ["O", "O"], "1 words and 2 labels"),
        ([], [], "0 words"),
        (["Peter", " "], ["O", "O"], "' ' is no word"),
        (["Peter"], ["B-DOG"], "label 'B-DOG' is none of the task's"),
    ],
)
def test_a_row_that_does_not_fit_is_one_line(words: object, tags: object, message: str) -> None:
    with pytest.raises(DataError, match=f"^here: .*{message}"):
        TASK.example({"tokens": words, "tags": tags}, TASK.columns, "here")


def test_losses_are_those_of_transformers_heads() -> None:
    scores, labels = torch.randn(6, 5), torch.tensor([0, 1, 4, 3, 0, 2])
    torch.testing.assert_close(TASK.losses(scores, labels).mean(), torch.nn.CrossEntropyLoss()(scores, labels))
