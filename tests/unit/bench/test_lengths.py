"""Sentences are found in prose, wrapped or not, and their lengths are those a client's encoding
gives."""

import pytest

from fedbert_ds.bench.lengths import article_lengths, sentence_lengths, sentences
from fedbert_ds.errors import DataError

TEXT = (
    "The fox jumps\nover the dog. It runs (far) away! Is that so? See e.g. the other fox.\n\n"
    'A second paragraph without an end\n\n"Quoted." Then more .'
)


def test_sentences_end_before_a_capital_and_at_blank_lines():
    assert list(sentences(TEXT)) == [
        "The fox jumps over the dog.",
        "It runs (far) away!",
        "Is that so?",
        "See e.g. the other fox.",
        "A second paragraph without an end",
        '"Quoted."',
        "Then more .",
    ]


def test_lengths_count_the_tokens_of_each_sentence_or_article(tmp_path):
    path = tmp_path / "some.txt"
    # Words this frequent are one piece each.
    path.write_text("The fox runs. " * 40 + "The fox runs the fox runs.")
    assert sentence_lengths(str(path)) == [6] * 40 + [9]
    assert article_lengths(str(path)) == [40 * 4 + 7 + 2]


def test_longer_sentences_are_cut_in_pieces(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("The fox runs. " * 40)
    assert sentence_lengths(str(path), longest=5) == [5, 3] * 40
    assert article_lengths(str(path), longest=102) == [102, 62]


def test_text_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        sentence_lengths(str(tmp_path / "none.txt"))
