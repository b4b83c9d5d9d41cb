"""The vocabulary: train WordPiece, load a tokenizer, compare two by hash, carry one as bytes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbert_ds.data.corpus import HasText
from fedbert_ds.data.long_steps import working
from fedbert_ds.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SMALLEST_VOCABULARY = 64
COVERED = 0.999
"""Share of a text's characters that are in the alphabet, if the vocabulary has room."""
LONGEST_WORD = 100
"""Characters of a word that WordPiece reads; it takes a longer one for [UNK]."""
TRAINING = "text    training the tokenizer"
_BLOCK = 4096
"""Copies of a word at once."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")
_KIND_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")
"""One of these says which tokenizer it is."""


@dataclass(frozen=True)
class Letters:
    """Which letters a trained WordPiece tokenizer takes for the same."""

    lowercase: bool = True
    """Capitals for small ones."""
    strip_accents: bool | None = None
    """Those with accents for those without. None: with `lowercase`."""


BERTS = Letters()


def train_wordpiece(articles: Iterable[HasText], vocab_size: int, letters: Letters = BERTS) -> PreTrainedTokenizerFast:
    """Train a BERT tokenizer of at most `vocab_size` word pieces; [PAD] is id 0.

    The same articles give the same vocabulary in every process. DataError for no text or fewer than
    64 pieces.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(f"tokenizer.vocab_size {vocab_size} is too small; use {SMALLEST_VOCABULARY} or more")
    words = count_words((article.text for article in articles), letters)
    if not words:
        raise DataError(
            f"no text to train a tokenizer on, in words of up to {LONGEST_WORD} characters; add text to data.source, "
            "set tokenizer.kind: byte_bpe for text without spaces, or name one in tokenizer.path"
        )
    return wordpiece_of_counts(words, vocab_size, letters)


def count_words(texts: Iterable[str], letters: Letters = BERTS) -> Counter[str]:
    """How often each word of these texts occurs, as a BERT tokenizer divides them: punctuation
    apart. Longer words than LONGEST_WORD, which it does not read, are left out.
    """
    normalizer, pre_tokenizer = _word_rules(letters)
    runs: Counter[str] = Counter()
    for text in texts:
        runs.update(normalizer.normalize_str(text).split())
    words: Counter[str] = Counter()
    for run, count in runs.items():
        for word, _ in pre_tokenizer.pre_tokenize_str(run):
            if len(word) <= LONGEST_WORD:
                words[word] += count
    return words


def wordpiece_of_counts(words: Mapping[str, int], vocab_size: int, letters: Letters = BERTS) -> PreTrainedTokenizerFast:
    """The tokenizer that `train_wordpiece` makes of a text with these words of `count_words`, at
    least one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import BertTokenizer

    alphabet, continuing = _alphabet(words, vocab_size - len(SPECIAL_TOKENS))
    # The trainer numbers `##x` pieces in the order of a hash map, which differs between processes,
    # and breaks ties by number. Special tokens are numbered first and in order, so naming the
    # pieces there fixes the vocabulary.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *(f"##{character}" for character in continuing)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with working(TRAINING):
        learner.train_from_iterator(_repeated(words), trainer)

    # A new tokenizer around the vocabulary, whose `##x` pieces are not special.
    tokenizer = Tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _word_rules(letters)
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", SPECIAL_TOKENS.index("[SEP]")), ("[CLS]", SPECIAL_TOKENS.index("[CLS]"))
    )
    return BertTokenizer(
        tokenizer_object=tokenizer, do_lower_case=letters.lowercase, strip_accents=letters.strip_accents
    )


def load_tokenizer(name_or_folder: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder (read without any network) or of a hub name.

    DataError when there is none or it has no fast form.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = local_folder(name_or_folder)
    if folder is not None and not folder.is_dir():
        raise DataError(f"{name_or_folder}: no such folder; name one that holds a tokenizer, or a hub name")
    if folder is not None and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise DataError(f"{name_or_folder}: no tokenizer.json in this folder; save the tokenizer there")
    if folder is not None and not any((folder / file).is_file() for file in _KIND_FILES):
        raise DataError(
            f"{name_or_folder}: a vocabulary alone does not say how it divides text; put the tokenizer.json or the "
            "tokenizer_config.json there that came with it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder or name_or_folder), local_files_only=folder is not None, trust_remote_code=False
        )
    except Exception as error:  # hub, network, JSON and tokenizer errors share no base
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{name_or_folder}: no tokenizer there ({reason}); name a folder or hub name") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"{name_or_folder}: this tokenizer has no tokenizer.json; choose one that has")
    return tokenizer


def local_folder(name_or_folder: str) -> Path | None:
    """The folder meant, existing or not; None for a name of the hub (`NAME` or `OWNER/NAME`)."""
    path = Path(name_or_folder).expanduser()
    is_path = path.is_dir() or path.is_absolute() or name_or_folder.startswith(".") or len(path.parts) > 2
    return path if is_path else None


def vocabulary_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256, as 64 hexadecimal digits, over the vocabulary's sorted (token, id) pairs."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Differs for tokenizers that could make other tokens of a text; SHA-256, hexadecimal."""
    import tokenizers

    return hashlib.sha256(tokenizers.__version__.encode() + tokenizer_to_bytes(tokenizer)).hexdigest()


def num_rows(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows that a word table needs: more than there are words where ids have gaps, as those of a
    vocabulary that holds a word twice.
    """
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def tokenizer_to_bytes(tokenizer: PreTrainedTokenizerFast) -> bytes:
    """One JSON document, from which `tokenizer_from_bytes` makes an equal tokenizer."""
    document = {
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special_tokens": tokenizer.special_tokens_map,
        "extra_special_tokens": list(tokenizer.extra_special_tokens),
        "model_max_length": tokenizer.model_max_length,
        "model_input_names": list(tokenizer.model_input_names),
        "padding_side": tokenizer.padding_side,
    }
    return json.dumps(document).encode()


def tokenizer_from_bytes(data: bytes) -> PreTrainedTokenizerFast:
    """The tokenizer of `tokenizer_to_bytes`; data only, never executed. DataError if malformed."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        document = json.loads(data)
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(document["tokenizer"]),
            **_checked_special_tokens(document["special_tokens"]),
            extra_special_tokens=[str(token) for token in document.get("extra_special_tokens", ())],
            model_max_length=int(document["model_max_length"]),
            model_input_names=[str(name) for name in document["model_input_names"]],
            padding_side=str(document["padding_side"]),
        )
    except Exception as error:  # tokenizers raises bare Exception for a malformed tokenizer
        raise DataError(f"the tokenizer received is malformed ({error}); use the same version on both sides") from error


def _checked_special_tokens(tokens: dict[str, Any]) -> dict[str, Any]:
    """The special-token map; ValueError unless it maps names to a token or a list of tokens."""
    for name, value in tokens.items():
        texts = value if isinstance(value, list) else [value]
        if not name.endswith(("_token", "_tokens")) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"special token {name}")
    return tokens


def _word_rules(letters: Letters) -> tuple[Any, Any]:
    """What makes words of a text: BERT's normalizer and pre-tokenizer."""
    from tokenizers import normalizers, pre_tokenizers

    normalizer = normalizers.BertNormalizer(lowercase=letters.lowercase, strip_accents=letters.strip_accents)
    return normalizer, pre_tokenizers.BertPreTokenizer()


def _repeated(words: Mapping[str, int]) -> Iterator[str]:
    """Each word as often as it counts: trainers take text alone. In blocks, which is fastest, and
    faster than the text itself, since nothing is left to normalize.
    """
    for word, count in words.items():
        for first in range(0, count, _BLOCK):
            yield f"{word} " * min(_BLOCK, count - first)


def _alphabet(words: Mapping[str, int], pieces: int) -> tuple[list[str], list[str]]:
    """The most frequent characters, sorted, and those of them that occur inside words.

    A quarter of the vocabulary at most, which the alphabets of most scripts fill by far; for others
    (Chinese) as many as make up nearly all of the text, and leave room for none but themselves.
    """
    counts: Counter[str] = Counter()
    continuing: set[str] = set()
    for word, count in words.items():
        for character in word:
            counts[character] += count
        continuing.update(word[1:])
    by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
    kept, covered, total = set(by_frequency[: pieces // 4]), 0, sum(counts.values())
    room = pieces
    for character in by_frequency:
        room -= 1 + (character in continuing)
        if room < 0 or (character not in kept and covered >= COVERED * total):
            break
        covered += counts[character]
        kept.add(character)
    alphabet = sorted(kept)
    return alphabet, [character for character in alphabet if character in continuing]
