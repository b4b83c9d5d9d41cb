"""A byte-level vocabulary reads everything, and is the same in every process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedbert_ds.data.byte_bpe import SMALLEST_VOCABULARY, SPECIAL_TOKENS, train_byte_bpe
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.masking import encode
from fedbert_ds.data.shards import write_shard
from fedbert_ds.data.tokenizer import load_tokenizer, tokenizer_from_bytes, tokenizer_to_bytes, vocabulary_hash
from fedbert_ds.errors import DataError

TEXTS = {
    "Thai": "ผู้ป่วยเข้ารับการรักษาในโรงพยาบาลเนื่องจากมีไข้สูงและปวดศีรษะ" * 5,
    "a protein": "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKV" * 5,
    "emoji and ends": "so 👩‍⚕️ it\ngoes \t on",
    "English": "The patient was admitted. Möchte he?",
}  # fmt: skip
ARTICLES = [Article(name, text) for name, text in TEXTS.items()]


def test_every_text_is_read_to_its_last_byte(tmp_path: Path) -> None:
    """Saved and loaded again, and sent as bytes, too."""
    tokenizer = train_byte_bpe(ARTICLES, 400)
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(SPECIAL_TOKENS) and len(tokenizer) == 400
    assert tokenizer.pad_token_id == 1 and tokenizer.mask_token == "<mask>"
    tokenizer.save_pretrained(tmp_path)
    for same in (tokenizer, load_tokenizer(str(tmp_path)), tokenizer_from_bytes(tokenizer_to_bytes(tokenizer))):
        for text in TEXTS.values():
            ids = same(text, add_special_tokens=False).input_ids
            assert same.unk_token_id not in ids
            assert same.decode(ids, clean_up_tokenization_spaces=False) == text
        assert same("so").input_ids[0] == 0 and same("so").input_ids[-1] == 2


def test_small_letters_on_request() -> None:
    ids = train_byte_bpe(ARTICLES, 400, lowercase=True)("MÖCHTE", add_special_tokens=False).input_ids
    assert train_byte_bpe(ARTICLES, 400, lowercase=True).decode(ids) == "möchte"


def test_it_is_the_same_in_every_process(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.jsonl", ARTICLES)
    command = (
        "import sys; from fedbert_ds.data.corpus import read_articles; "
        "from fedbert_ds.data.byte_bpe import train_byte_bpe; from fedbert_ds.data.tokenizer import vocabulary_hash; "
        "print(vocabulary_hash(train_byte_bpe(list(read_articles(sys.argv[1:])), 400)))"
    )
    arguments = [sys.executable, "-c", command, str(tmp_path / "a.jsonl")]
    printed = {subprocess.run(arguments, check=True, capture_output=True, timeout=120).stdout for _ in range(3)}
    assert printed == {vocabulary_hash(train_byte_bpe(ARTICLES, 400)).encode() + b"\n"}


def test_sequences_for_training_hold_the_text_between_its_ends() -> None:
    tokenizer = train_byte_bpe(ARTICLES, 400)
    text = encode(ARTICLES, tokenizer, 32)
    assert text.tokens[0] == 0 and text.tokens[-1] == 2 and int(text.lengths.max()) == 32


@pytest.mark.parametrize("texts", [[], [""], [" \n"]])
def test_nothing_to_train_on(texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_byte_bpe([Article("", text) for text in texts], 400)


def test_every_byte_needs_room() -> None:
    assert len(train_byte_bpe(ARTICLES, SMALLEST_VOCABULARY)) == SMALLEST_VOCABULARY
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size 260 is too small for bytes; use 261 or more"):
        train_byte_bpe(ARTICLES, 260)
