"""A tokenizer, and text that it is to read: whether it can be read, and how much becomes [UNK]."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from fedbert_ds.data.corpus import LONGEST_WORD, Article, Reading, read_articles
from fedbert_ds.doctor.finding import Finding, fault, of_error, ok, warning
from fedbert_ds.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAMPLE_CHARACTERS = 5_000_000
"""Of the text that is read: a doctor must not take as long as a run's start."""


def tokenizer_finding(name: str) -> tuple[Finding, PreTrainedTokenizerFast | None]:
    """Whether a tokenizer can be loaded and masks words, and the tokenizer."""
    from fedbert_ds.data.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(name)
    except UserError as error:
        return of_error("tokenizer", error), None
    if tokenizer.mask_token_id is None:
        return fault("tokenizer", f"{name} has no mask token", "name one of a masked LM in tokenizer.path"), None
    return ok("tokenizer", f"{name}: {len(tokenizer):,} pieces"), tokenizer


def sampled(sources: Sequence[str], reading: Reading) -> tuple[list[Finding], list[Article]]:
    """Findings about some text, and its first articles. The rest is not read."""
    articles: list[Article] = []
    characters, is_all = 0, True
    try:
        for article in read_articles(sources, streaming=True, reading=reading):
            articles.append(article)
            characters += len(article.text)
            if characters >= SAMPLE_CHARACTERS:
                is_all = False
                break
    except UserError as error:
        return [of_error("text", error)], []
    part = "" if is_all else " at its beginning; the rest was not read"
    findings = [ok("text", f"{len(articles):,} articles, {characters:,} characters{part}")]
    for sentence in reading.sentences():
        findings.append(warning("text", sentence, "look at these if they should be read"))
    longest = max((len(word) for article in articles for word in article.text.split()), default=0)
    if longest <= LONGEST_WORD:
        findings.append(ok("longest word", f"{longest:,} characters"))
    return findings, articles


def unknown_findings(articles: Iterable[Article], tokenizer: PreTrainedTokenizerFast) -> Iterator[Finding]:
    """The share of a text's tokens that the tokenizer does not know."""
    from fedbert_ds.data.masking import MUCH_UNKNOWN, encode

    if tokenizer.unk_token_id is None:
        yield ok("[UNK]", "this tokenizer reads every character")
        return
    try:
        text = encode(articles, tokenizer, 512)
    except UserError as error:
        yield of_error("[UNK]", error)
        return
    tokens = text.num_tokens - 2 * text.num_sequences
    unknown = text.count(tokenizer.unk_token_id)
    says, remedy = f"{100 * unknown / max(1, tokens):.1f} % of {tokens:,} tokens", "name another tokenizer"
    if unknown == tokens:
        yield fault("[UNK]", f"{says}: the tokenizer knows no word of this text", remedy)
    elif unknown > MUCH_UNKNOWN * tokens:
        yield warning("[UNK]", f"{says}, of which nothing is learned", remedy)
    else:
        yield ok("[UNK]", says)
