"""Special tokens in text, tokens that were added for it, and words of every kind of tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fedbert_ds.data.corpus import Article
from fedbert_ds.data.masking import Masker, encode
from fedbert_ds.data.plain_tokens import divides_words, plain_backend, words_begin
from fedbert_ds.data.tokenizer import tokenizer_from_bytes, tokenizer_to_bytes
from fedbert_ds.seeding import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def test_words_of_byte_level_tokens(byte_level: PreTrainedTokenizerFast) -> None:
    text = encode([Article("", "federating modeling, notes")], byte_level, 64)
    pieces = byte_level.convert_ids_to_tokens(text.tokens.tolist())
    words: list[str] = []
    for piece, begins in zip(pieces, text.word_starts.tolist(), strict=True):
        words = [*words, piece] if begins else [*words[:-1], words[-1] + piece]
    assert words == ["<s>", "federating", "Ġmodeling", ",", "Ġnotes", "</s>"]


@pytest.mark.parametrize("kind", ["unigram", "wordless"])
def test_words_of_sentence_pieces(kind: str, request: pytest.FixtureRequest) -> None:
    """A tokenizer for which a text is one word would have it masked whole."""
    tokenizer = request.getfixturevalue(kind)
    text = encode([Article("", "federating  modeling, notes of 7")], tokenizer, 64)
    pieces = tokenizer.convert_ids_to_tokens(text.tokens.tolist())
    words: list[str] = []
    for piece, begins in zip(pieces, text.word_starts.tolist(), strict=True):
        words = [*words, piece] if begins else [*words[:-1], words[-1] + piece]
    spelled = [word.replace("<unk>", "?").strip("▁") for word in words]
    assert [word for word in spelled if word] == ["<s>", "federating", "modeling,", "notes", "of", "?", "</s>"]


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level", "unigram"])
def test_tokens_added_for_the_text_are_found_in_it(kind: str, request: pytest.FixtureRequest) -> None:
    """Words are predicted, special tokens that stand for something are not; over the wire, too."""
    tokenizer = tokenizer_from_bytes(tokenizer_to_bytes(request.getfixturevalue(kind)))
    tokenizer.add_tokens(["troponin"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["[NAME]"]})
    word, name = tokenizer.convert_tokens_to_ids(["troponin", "[NAME]"])
    for known in (tokenizer, tokenizer_from_bytes(tokenizer_to_bytes(tokenizer))):
        text = encode([Article("", "troponin of [NAME] [MASK]")], known, 64)
        assert text.tokens.tolist().count(word) == text.tokens.tolist().count(name) == 1
        assert known.mask_token_id not in text.tokens
        at = {int(token): bool(begins) for token, begins in zip(text.tokens, text.word_starts, strict=True)}
        assert at[word] and at[name]
        masker = Masker(known, mask_probability=1.0)
        _, _, labels = masker.mask(text.tokens.numpy(), text.word_starts.numpy(), generator("x"))
        assert word in labels and name not in labels


def test_text_that_looks_like_a_special_token_is_text(any_tokenizer: PreTrainedTokenizerFast) -> None:
    text = encode([Article("", f"a {any_tokenizer.mask_token} b {any_tokenizer.sep_token} c")], any_tokenizer, 64)
    unexpected = set(any_tokenizer.all_special_ids) - {any_tokenizer.unk_token_id}
    assert not set(text.tokens[1:-1].tolist()) & unexpected


def test_words_are_asked_of_the_text_only_where_a_tokenizer_has_none(
    any_tokenizer: PreTrainedTokenizerFast, wordless: PreTrainedTokenizerFast
) -> None:
    backend = plain_backend(any_tokenizer)
    assert divides_words(backend) is (any_tokenizer is not wordless)
    nothing = backend.encode("", add_special_tokens=False)
    assert words_begin(nothing, "").tolist() == words_begin(nothing).tolist() == []
