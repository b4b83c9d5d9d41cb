"""What a tokenizer makes of plain text: which tokens, and where words begin."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy that neither truncates nor pads, and takes "[MASK]" in text for text.

    Special tokens without a part in sequences, such as "[NAME]", are found in text.
    """
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    extra = set(map(str, tokenizer.extra_special_tokens))
    for token in document["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in extra
    backend = _plain(document)
    roles = set(map(str, tokenizer.all_special_tokens)) - extra - {tokenizer.unk_token}
    found = [name for name in sorted(roles) if tokenizer.convert_tokens_to_ids(name) in _ids(backend, name)]
    # A piece of SentencePiece's is found in text whatever it stands for.
    return _plain(_unreadable(document, found)) if found else backend


def _plain(document: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(json.dumps(document))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _ids(backend: Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def _unreadable(document: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """tokenizer.json with other spellings for these pieces, which no text has; ids stay."""
    spelled = {name: f"\U0010ffff{name}" for name in names}
    model, pieces = document["model"], document["model"]["vocab"]
    if isinstance(pieces, list):
        vocabulary: Any = [[spelled.get(piece, piece), score] for piece, score in pieces]
    else:
        vocabulary = {spelled.get(piece, piece): number for piece, number in pieces.items()}
    added = [token for token in document["added_tokens"] if token["content"] not in spelled]
    return document | {"model": model | {"vocab": vocabulary}, "added_tokens": added}


def divides_words(backend: Tokenizer) -> bool:
    """Whether it has words: for some tokenizers of SentencePiece a whole text is one."""
    return len(set(backend.encode("a b", add_special_tokens=False).word_ids)) > 1


def words_begin(encoding: Encoding, text: str | None = None) -> np.ndarray:
    """[n] bool: the tokens of an encoding that begin a word; with the text that it is of, also
    those that begin with white space or come after it.
    """
    # A token outside any word is None; -1 keeps it apart from its neighbours.
    words = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
    begins = np.ones(len(words), dtype=bool)
    begins[1:] = (words[1:] != words[:-1]) | (words[1:] < 0)
    if text is not None:
        ends = [0, *(end for _, end in encoding.offsets)]
        spaces = [text[end : begin + 1] for end, (begin, _) in zip(ends, encoding.offsets, strict=False)]
        begins |= np.array([any(map(str.isspace, space)) for space in spaces], dtype=bool)
    return begins
