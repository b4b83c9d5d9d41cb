"""A byte-level BPE tokenizer, trained: it reads every script, and text without spaces."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from fedbert_ds.data.corpus import HasText
from fedbert_ds.data.long_steps import working
from fedbert_ds.data.tokenizer import TRAINING
from fedbert_ds.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
"""In RoBERTa's order."""
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
"""Every byte is a piece."""
LONGEST_RUN = 100
"""Characters of one run of letters; a longer one is cut, which bounds the time for it."""


def train_byte_bpe(articles: Iterable[HasText], vocab_size: int, lowercase: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `vocab_size` pieces (Radford et al. 2019).

    The same articles give the same vocabulary in every process. DataError for no text or a
    vocabulary that does not hold every byte.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(f"tokenizer.vocab_size {vocab_size} is too small for bytes; use {SMALLEST_VOCABULARY} or more")
    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    cut = pre_tokenizers.Split(Regex(rf"\S{{1,{LONGEST_RUN}}}|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = False
    told = ExitStack()

    def texts() -> Iterable[str]:
        nonlocal seen
        for article in articles:
            seen = seen or bool(article.text.strip())
            yield article.text
        told.enter_context(working(TRAINING))

    with told:
        tokenizer.train_from_iterator(texts(), trainer)
    if not seen:
        raise DataError("no text to train a tokenizer on; add text to data.source or name one in tokenizer.path")
    tokenizer.decoder = decoders.ByteLevel()
    first, last = SPECIAL_TOKENS[0], SPECIAL_TOKENS[2]
    tokenizer.post_processor = processors.RobertaProcessing(
        (last, SPECIAL_TOKENS.index(last)), (first, SPECIAL_TOKENS.index(first)), add_prefix_space=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=first,
        cls_token=first,
        pad_token=SPECIAL_TOKENS[1],
        eos_token=last,
        sep_token=last,
        unk_token=SPECIAL_TOKENS[3],
        mask_token=SPECIAL_TOKENS[4],
    )
