"""Merged counts are sums of common words alone, and make the vocabulary of the pooled text."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbert_ds.data.corpus import Article
from fedbert_ds.data.tokenizer import count_words, train_wordpiece, wordpiece_of_counts
from fedbert_ds.errors import DataError
from fedbert_ds.vocabulary.counts import (
    FORMAT,
    Revealed,
    WordCounts,
    merge_counts,
    read_counts,
    restrict,
    revealed,
    write_counts,
)

ALPHABET = "abc"
WORDS = st.dictionaries(st.text(ALPHABET, min_size=1, max_size=2), st.integers(1, 9), max_size=8)
OWNERS = st.lists(WORDS, min_size=1, max_size=5)


def owners_of(tables: list[dict[str, int]]) -> list[WordCounts]:
    return [WordCounts(f"owner {number}", words) for number, words in enumerate(tables)]


def merged_or_nothing(counts: list[WordCounts], least: int) -> dict[str, int]:
    try:
        return merge_counts(counts, least)
    except DataError as error:
        assert "no word is one of" in str(error)
        return {}


@given(OWNERS, st.data())
def test_a_word_counts_only_when_enough_owners_have_it(tables: list[dict[str, int]], data: st.DataObject) -> None:
    least = data.draw(st.integers(1, len(tables)))
    merged = merged_or_nothing(owners_of(tables), least)
    for word in {word for words in tables for word in words}:
        having = sum(word in words for words in tables)
        assert merged.get(word) == (sum(words.get(word, 0) for words in tables) if having >= least else None)
    assert list(merged) == sorted(merged) and set(merged) <= {word for words in tables for word in words}


@given(OWNERS, st.data())
def test_the_order_of_owners_does_not_matter_and_more_asked_is_less(
    tables: list[dict[str, int]], data: st.DataObject
) -> None:
    counts = owners_of(tables)
    least = data.draw(st.integers(1, len(tables)))
    merged = merged_or_nothing(counts, least)
    assert merged_or_nothing(data.draw(st.permutations(counts)), least) == merged
    if least < len(tables):
        assert merged_or_nothing(counts, least + 1).items() <= merged.items()


@given(OWNERS)
def test_what_each_revealed_is_counted(tables: list[dict[str, int]]) -> None:
    counts = owners_of(tables)
    merged = merged_or_nothing(counts, min(2, len(counts)))
    for one, said in zip(counts, revealed(counts, merged), strict=True):
        others = {word for other in counts if other is not one for word in other.words}
        assert said == Revealed(
            one.owner, len(one.words), len(one.words.keys() & merged.keys()), len(one.words.keys() - others), False
        )


@given(WORDS, st.integers(1, 9), st.none() | st.integers(1, 9))
def test_restricting_keeps_the_most_frequent(words: dict[str, int], minimum: int, most: int | None) -> None:
    kept = restrict(words, minimum, most)
    assert kept.items() <= words.items() and len(kept) <= (len(words) if most is None else most)
    left = {word: count for word, count in words.items() if word not in kept and count >= minimum}
    assert all(count <= min(kept.values(), default=0) for count in left.values()) and not (left and most is None)
    assert all(count >= minimum for count in kept.values())


def test_digits_of_any_script_can_be_left_out() -> None:
    words = {"covid19": 3, "covid": 2, "2024": 9, "\u0663\u0664": 1, "x\u00b2": 1}
    assert restrict(words, digits=False) == {"covid": 2}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(), max_size=4))
def test_words_of_any_text_are_words_and_add_up(texts: list[str]) -> None:
    """Owners count apart; every word must be what the tokenizer would make of it again."""
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    together = count_words(texts)
    assert together == sum((count_words([text]) for text in texts), Counter())
    assert WordCounts("me", together).words == together


@pytest.fixture
def shards() -> list[list[Article]]:
    """Three owners' articles, with words in common and words of one owner."""
    common = "the patient was seen for a follow-up, and the treatment of the patient goes on. "
    own = ["cardiac murmur, cardiology. ", "fractured femur; femoral shaft! ", "naïve lymphocytes (leukocytes) 漢字 "]
    return [[Article("", common * (2 + number) + text * 7)] for number, text in enumerate(own)]


@pytest.mark.parametrize("size", [64, 90, 200])
def test_counts_of_all_make_the_vocabulary_of_the_pooled_text(shards: list[list[Article]], size: int) -> None:
    counts = [
        WordCounts(f"owner {number}", count_words(article.text for article in shard))
        for number, shard in enumerate(shards)
    ]
    pooled = train_wordpiece([article for shard in shards for article in shard], size)
    assert wordpiece_of_counts(merge_counts(counts, 1), size).get_vocab() == pooled.get_vocab()
    # And the library makes the same of the text itself.
    assert pooled.get_vocab().keys() == trained_on_text(shards, size, pooled.get_vocab())


def trained_on_text(shards: list[list[Article]], size: int, vocabulary: dict[str, int]) -> set[str]:
    """What tokenizers learns of the text as it is, given the alphabet of a vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = sorted(piece for piece in vocabulary if len(piece) == 1)
    continuing = sorted(piece for piece in vocabulary if piece.startswith("##") and len(piece) == 3)
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=[*special, *continuing], initial_alphabet=characters,
        limit_alphabet=len(characters), show_progress=False,
    )  # fmt: skip
    learner.train_from_iterator([article.text for shard in shards for article in shard], trainer)
    return set(learner.get_vocab())


def test_a_word_repeated_in_blocks_counts_as_often() -> None:
    """4,096 copies are fed at once: one more or less decides between two words here."""
    pieces = [
        wordpiece_of_counts({"ab": 4097, "cd": count, **{f"e{x}": 1 for x in "fghijklmnopqrst"}}, 64).get_vocab()
        for count in (4096, 4098)
    ]
    assert pieces[0]["ab"] < pieces[0]["cd"] and pieces[1]["cd"] < pieces[1]["ab"]


def test_words_of_one_owner_are_in_no_common_vocabulary(shards: list[list[Article]]) -> None:
    counts = [WordCounts(str(n), count_words(a.text for a in shard)) for n, shard in enumerate(shards)]
    merged = merge_counts(counts, 2)
    assert "patient" in merged and not {"cardiac", "femur", "lymphocytes"} & merged.keys()
    tokenizer = wordpiece_of_counts(merged, 200)
    assert "漢" not in "".join(tokenizer.get_vocab())
    # Other words are read in pieces, unless a character of theirs is in no common word.
    assert tokenizer.unk_token not in tokenizer.tokenize("leaf eats") and len(tokenizer.tokenize("leaf")) > 1
    assert tokenizer.tokenize("漢 jam") == ["[UNK]", "[UNK]"]


@given(WORDS, st.booleans())
def test_a_file_comes_back_equal(tmp_path_factory: pytest.TempPathFactory, words: dict[str, int], chosen: bool) -> None:
    path = tmp_path_factory.mktemp("counts") / "counts.json"
    write_counts(path, WordCounts("a 'b' é", words, chosen))
    assert read_counts(path) == WordCounts("a 'b' é", words, chosen)
    assert list(read_counts(path).words) == list(words)


def document(**changes: object) -> str:
    return json.dumps({"format": FORMAT, "owner": "me", "selected": False, "words": {"a": 1}} | changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "is something else, not fedbert-ds word counts 1"),
        ("{}", "is something else"),
        ("[" * 100_000, "not JSON"),
        (document(format="fedbert-ds word digests 1"), "is fedbert-ds word digests 1, not fedbert-ds word counts 1"),
        (document(owner=3), "has no right owner"),
        (document(owner=""), "the owner has no name"),
        (document(selected="yes"), "has no right selected"),
        (document(words=["a"]), "has no right words"),
        (document(words={"a": "3"}), "a word's count is no number"),
        (document(words={"a": True}), "a word's count is no number"),
        (document(words={"a": 1.5}), "a word's count is no number"),
        (document(words={"a": 0}), "'a' occurs 0 times"),
        (document(words={"The": 1}), "'The' is no word of a lower-casing BERT tokenizer"),
        (document(words={"a b": 1}), "'a b' is no word"),
        (document(words={"don't": 1}), '"don\'t" is no word'),
        (document(words={"": 1}), "'' is no word"),
        (document(words={"\ud800": 1}), "make it with fedbert-ds vocab count"),
    ],
)
def test_another_file_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "counts.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_counts(path)
    assert message in str(caught.value) and str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataError, match=r"no such file|not JSON"):
            read_counts(path)


def test_owners_that_do_not_fit_are_one_line() -> None:
    one = WordCounts("ada", {"a": 1})
    with pytest.raises(DataError, match="two files are of ada, whose words would count twice"):
        merge_counts([one, WordCounts("ada", {"a": 1})], 2)
    for least in (0, -1, 3):
        with pytest.raises(DataError, match=rf"--least {least}: counts of 2 owners are here; choose 1 to 2"):
            merge_counts([one, WordCounts("bo", {})], least)
    with pytest.raises(DataError, match="no word is one of 2 owners; lower --least"):
        merge_counts([one, WordCounts("bo", {"b": 1})], 2)
