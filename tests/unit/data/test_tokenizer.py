"""A trained vocabulary is BERT's kind and the same everywhere; tokenizers travel as bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from fedbert_ds.data.corpus import Article
from fedbert_ds.data.shards import write_shard
from fedbert_ds.data.tokenizer import (
    SPECIAL_TOKENS,
    Letters,
    load_tokenizer,
    num_rows,
    tokenizer_from_bytes,
    tokenizer_to_bytes,
    train_wordpiece,
    vocabulary_hash,
)
from fedbert_ds.errors import DataError
from fedbert_ds.tokenizer_folder import save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Federating pre-trained models, naïvely: don't.",
    "a [MASK] or a <mask> b </s>",
    "  two  spaces\nand 漢字 ☃ lines ",
    "",
    "x" * 300,
]


def test_wordpiece_is_berts(wordpiece: PreTrainedTokenizerFast) -> None:
    assert wordpiece.convert_ids_to_tokens(range(5)) == list(SPECIAL_TOKENS)
    assert (wordpiece.pad_token_id, wordpiece.mask_token) == (0, "[MASK]")
    assert len(wordpiece) == 200
    encoded = wordpiece("Modeling, FEDERATED naïve")
    tokens = wordpiece.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and "," in tokens
    assert wordpiece.decode(encoded["input_ids"], skip_special_tokens=True) == "modeling, federated naive"
    assert sorted(wordpiece.get_vocab().values()) == list(range(200))
    assert sorted(wordpiece.all_special_ids) == [0, 1, 2, 3, 4]


def test_wordpiece_matches_berts_tokenizer_given_the_same_vocabulary(wordpiece: PreTrainedTokenizerFast) -> None:
    from transformers import BertTokenizer

    reference = BertTokenizer(vocab=wordpiece.get_vocab())
    for text in TEXTS:
        assert wordpiece(text).input_ids == reference(text).input_ids


def test_wordpiece_is_the_same_in_every_process(
    articles: list[Article], wordpiece: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_shard(tmp_path / "a.jsonl", articles)
    command = (
        "import sys; from fedbert_ds.data.corpus import read_articles; "
        "from fedbert_ds.data.tokenizer import train_wordpiece, vocabulary_hash; "
        "print(vocabulary_hash(train_wordpiece(list(read_articles(sys.argv[1:])), 200)))"
    )
    for _ in range(2):
        printed = subprocess.run(
            [sys.executable, "-c", command, str(tmp_path / "a.jsonl")], check=True, capture_output=True, timeout=60
        ).stdout
        assert printed.decode().split()[-1] == vocabulary_hash(wordpiece)


def test_vocabulary_size_is_kept_for_a_large_alphabet() -> None:
    text = " ".join(chr(0x4E00 + number) + chr(0x3B1 + number % 24) for number in range(500))
    tokenizer = train_wordpiece([Article("", text)], 100)
    assert len(tokenizer) <= 100


@pytest.mark.parametrize("texts", [[], [""], [" \n\t"]])
def test_nothing_to_train_on(texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_wordpiece([Article("", text) for text in texts], 100)


def test_vocabulary_too_small() -> None:
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size 20 is too small; use 64 or more"):
        train_wordpiece([Article("", "text")], 20)


@pytest.mark.parametrize("model_type", [None, "bert", "electra", "roberta"])
def test_trained_tokenizer_loads_beside_any_model(
    wordpiece: PreTrainedTokenizerFast, tmp_path: Path, model_type: str | None
) -> None:
    wordpiece.save_pretrained(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert_same(load_tokenizer(str(tmp_path)), wordpiece)


def test_round_trip_as_bytes(any_tokenizer: PreTrainedTokenizerFast) -> None:
    data = tokenizer_to_bytes(any_tokenizer)
    restored = tokenizer_from_bytes(data)
    assert_same(restored, any_tokenizer)
    assert vocabulary_hash(restored) == vocabulary_hash(any_tokenizer)
    assert restored.model_max_length == any_tokenizer.model_max_length
    assert_same(tokenizer_from_bytes(tokenizer_to_bytes(restored)), any_tokenizer)


def test_what_is_saved_names_a_class_that_transformers_4_has(
    any_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Of a tokenizer that crossed the wire, too, and beside any model."""
    for number, tokenizer in enumerate((any_tokenizer, tokenizer_from_bytes(tokenizer_to_bytes(any_tokenizer)))):
        folder = tmp_path / str(number)
        save_tokenizer(tokenizer, folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
        told = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
        known = ("BertTokenizer", "BertTokenizerFast", "CamembertTokenizer", "RobertaTokenizer")
        assert told in (*known, "PreTrainedTokenizerFast")
        assert_same(load_tokenizer(str(folder)), any_tokenizer)


def assert_same(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> None:
    for text in TEXTS:
        first, second = one(text), other(text)
        assert first.input_ids == second.input_ids
        assert first.word_ids() == second.word_ids()
        assert one.decode(first.input_ids) == other.decode(second.input_ids)
    assert one.special_tokens_map == other.special_tokens_map
    assert (one.mask_token_id, sorted(one.all_special_ids)) == (other.mask_token_id, sorted(other.all_special_ids))
    assert one.get_vocab() == other.get_vocab()


def changed(document: dict[str, Any], **values: Any) -> bytes:
    return json.dumps(document | values).encode()


def test_malformed_bytes_are_refused(wordpiece: PreTrainedTokenizerFast) -> None:
    document = json.loads(tokenizer_to_bytes(wordpiece))
    malformed = [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        changed(document, tokenizer="{}"),
        changed(document, special_tokens={"name_or_path": "/etc/passwd"}),
        changed(document, special_tokens={"mask_token": {"lstrip": True}}),
        changed(document, special_tokens=[]),
        changed(document, model_max_length="many"),
        changed(document, padding_side="up"),
    ]
    for data in malformed:
        with pytest.raises(DataError, match="the tokenizer received is malformed"):
            tokenizer_from_bytes(data)


def test_hash_tells_vocabularies_apart(wordpiece: PreTrainedTokenizerFast, articles: list[Article]) -> None:
    assert len(vocabulary_hash(wordpiece)) == 64
    assert vocabulary_hash(wordpiece) != vocabulary_hash(train_wordpiece(articles, 199))


def test_ids_with_gaps_need_a_row_each(wordpiece: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """As of a vocabulary that holds a word twice, of which the last counts."""
    assert num_rows(wordpiece) == len(wordpiece)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word", "word", "other"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = load_tokenizer(str(tmp_path))
    assert len(tokenizer) == 7 and tokenizer.convert_tokens_to_ids("other") == 7
    assert num_rows(tokenizer) == 8
    tokenizer.add_tokens(["added"])
    assert num_rows(tokenizer) == 1 + tokenizer.convert_tokens_to_ids("added")


def test_tokenizers_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.json in this folder"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match="no such folder"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(DataError, match="no such folder"):
        load_tokenizer("runs/none/hf")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="no tokenizer there"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["vocab.txt", "vocab.json", "tokenizer.model"])
def test_a_vocabulary_alone_is_told_in_words(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[PAD]\n[UNK]\n")
    with pytest.raises(
        DataError, match=r"a vocabulary alone does not say how it divides text; put the tokenizer\.json"
    ):
        load_tokenizer(str(tmp_path))


def test_a_folder_is_read_without_network(
    wordpiece: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wordpiece.save_pretrained(tmp_path)

    def refuse(*arguments: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    assert len(load_tokenizer(str(tmp_path))) == 200


# -- scripts and spellings -------------------------------------------------------------------------

SCRIPTS = {
    "Latin": "The patient was admitted with a fever and a headache. ",
    "Hindi": "मरीज को तेज बुखार और सिरदर्द के साथ भर्ती कराया गया था। ",
    "Arabic": "تم إدخال المريض إلى المستشفى بسبب ارتفاع في درجة الحرارة. ",
    "Korean": "환자는 고열과 두통으로 입원했다. ",
    "Chinese": "病人因高烧和头痛入院，治疗持续了三天，随后出院。",
}


def articles_in(script: str) -> list[Article]:
    return [Article(str(n), SCRIPTS[script] * 20 + str(n)) for n in range(10)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_becomes_unk(script: str) -> None:
    tokenizer = train_wordpiece(articles_in(script), 300)
    assert tokenizer.unk_token_id not in tokenizer(SCRIPTS[script]).input_ids


def test_an_alphabet_of_thousands_covers_nearly_all_of_the_text() -> None:
    """Chinese, in a vocabulary that would give letters a quarter of its room: some 200."""
    random = Random(1)
    characters = [chr(0x4E00 + n) for n in range(600)]
    weights = [1 / (n + 1) for n in range(600)]
    articles = [Article(str(n), "".join(random.choices(characters, weights, k=2000))) for n in range(20)]
    tokenizer = train_wordpiece(articles, 800)
    ids = [id_ for article in articles for id_ in tokenizer(article.text, add_special_tokens=False).input_ids]
    assert len(tokenizer) <= 800 and ids.count(tokenizer.unk_token_id) < 0.002 * len(ids)


@pytest.mark.parametrize(
    ("letters", "text", "expected"),
    [
        (Letters(), "Möchte MOCHTE", ["mochte", "mochte"]),
        (Letters(lowercase=False), "Möchte Mochte", ["Möchte", "Mochte"]),
        (Letters(lowercase=True, strip_accents=False), "Möchte mochte", ["möchte", "mochte"]),
        (Letters(lowercase=False, strip_accents=True), "Möchte mochte", ["Mochte", "mochte"]),
        (Letters(strip_accents=False), "कमल कमाल", ["कमल", "कमाल"]),
    ],
)
def test_letters_that_are_the_same(tmp_path: Path, letters: Letters, text: str, expected: list[str]) -> None:
    """And still are, saved and loaded again, and sent as bytes."""
    tokenizer = train_wordpiece([Article("a", f"{text} " * 50)], 200, letters)
    tokenizer.save_pretrained(tmp_path)
    for same in (tokenizer, load_tokenizer(str(tmp_path)), tokenizer_from_bytes(tokenizer_to_bytes(tokenizer))):
        ids = same(text, add_special_tokens=False).input_ids
        assert same.unk_token_id not in ids and same.decode(ids) == " ".join(expected)


def test_words_of_more_than_a_hundred_characters_are_left_out_of_training() -> None:
    """They are [UNK] in any case; one of a million characters would take minutes."""
    tokenizer = train_wordpiece([Article("a", "so it goes " * 9 + "x" * 1_000_000)], 100)
    assert "x" not in tokenizer.get_vocab()
    with pytest.raises(DataError, match=r"in words of up to 100 characters; .* tokenizer\.kind: byte_bpe"):
        train_wordpiece([Article("a", "x" * 101)], 100)
