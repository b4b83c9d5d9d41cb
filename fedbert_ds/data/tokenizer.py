"""The vocabulary: train WordPiece, load a tokenizer, compare two by hash, carry one as bytes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbert_ds.data.corpus import Article
from fedbert_ds.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_SMALLEST_VOCABULARY = 64
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")


def train_wordpiece(articles: Iterable[Article], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a lower-casing BERT tokenizer of at most `vocab_size` word pieces; [PAD] is id 0.

    The same articles give the same vocabulary in every process. DataError for no text or fewer than
    64 pieces.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertTokenizer

    if vocab_size < _SMALLEST_VOCABULARY:
        raise DataError(f"tokenizer.vocab_size {vocab_size} is too small; use {_SMALLEST_VOCABULARY} or more")
    texts = [article.text for article in articles]
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    alphabet, continuing = _alphabet(learner, texts, largest=(vocab_size - len(SPECIAL_TOKENS)) // 4)
    if not alphabet:
        raise DataError("no text to train a tokenizer on; add text to data.source or name one in tokenizer.path")
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
    learner.train_from_iterator(texts, trainer)

    # A new tokenizer around the vocabulary, whose `##x` pieces are not special.
    tokenizer = Tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = learner.normalizer, learner.pre_tokenizer
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", SPECIAL_TOKENS.index("[SEP]")), ("[CLS]", SPECIAL_TOKENS.index("[CLS]"))
    )
    return BertTokenizer(tokenizer_object=tokenizer)


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


def tokenizer_to_bytes(tokenizer: PreTrainedTokenizerFast) -> bytes:
    """One JSON document, from which `tokenizer_from_bytes` makes an equal tokenizer."""
    document = {
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special_tokens": tokenizer.special_tokens_map,
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


def _alphabet(tokenizer: Tokenizer, texts: Iterable[str], largest: int) -> tuple[list[str], list[str]]:
    """The `largest` most frequent characters, sorted, and those of them that occur inside words."""
    runs: Counter[str] = Counter()
    for text in texts:
        runs.update(tokenizer.normalizer.normalize_str(text).split())
    counts: Counter[str] = Counter()
    continuing: set[str] = set()
    for run, count in runs.items():
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(run):
            for character in word:
                counts[character] += count
            continuing.update(word[1:])
    kept = sorted(sorted(counts, key=lambda character: (-counts[character], character))[:largest])
    return kept, [character for character in kept if character in continuing]
