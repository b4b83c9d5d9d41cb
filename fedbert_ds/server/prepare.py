"""The text of a local run: shards and held-out articles from the sources, and a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from fedbert_ds.atomic_write import write_text
from fedbert_ds.config import RunConfig
from fedbert_ds.errors import ConfigError, DataError, one_line, warn
from fedbert_ds.server.local_clients import client_name
from fedbert_ds.server.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from fedbert_ds.config import DataSection, TokenizerSection
    from fedbert_ds.data.corpus import Article


@dataclass(frozen=True)
class TextFacts:
    """Articles or examples dealt to local clients."""

    sources: tuple[str, ...]
    articles: int
    held_out: int
    shard_articles: tuple[int, ...]
    shard_characters: tuple[int, ...]
    unit: str = "articles"
    """What is counted: articles, or a task's examples."""

    @property
    def sentence(self) -> str:
        """These facts as one line for the user."""
        total = sum(self.shard_characters)
        shares = ", ".join(f"{100 * characters / total:.0f}" for characters in self.shard_characters)
        return (
            f"{', '.join(self.sources)}: {self.articles:,} {self.unit}, {sum(self.shard_articles):,} for "
            f"{len(self.shard_articles)} clients ({shares} %), {self.held_out:,} held out"
        )


def prepare_text(config: RunConfig, folder: RunFolder) -> tuple[PreTrainedTokenizerFast, TextFacts | None]:
    """Write shards, held-out text and tokenizer into the folder of a new run. Rank 0 calls it.

    Without local clients the server reads no text and returns no facts. Raises ConfigError if no
    tokenizer is named then, DataError if the text is not enough for what each client needs, or the
    tokenizer lacks tokens that sequences need.
    """
    from fedbert_ds.data.masking import check_mask, sequence_ends
    from fedbert_ds.data.tokenizer import load_tokenizer
    from fedbert_ds.tokenizer_folder import save_tokenizer

    name = config.tokenizer.path or config.model.checkpoint
    tokenizer = load_tokenizer(name) if name else None
    if tokenizer is not None and config.data.sequence_length > tokenizer.model_max_length:
        raise ConfigError(
            f"data.sequence_length {config.data.sequence_length} is longer than the tokenizer {name} takes; lower it "
            f"to {tokenizer.model_max_length} (model_max_length in its tokenizer_config.json)"
        )
    if tokenizer is not None:
        sequence_ends(tokenizer)
        if not config.task.is_labelled:
            check_mask(tokenizer)
    if tokenizer is not None and config.tokenizer.path and config.model.checkpoint:
        _compare_vocabularies(tokenizer, config.tokenizer.path, config.model.checkpoint)
    if not config.clients.local:
        if tokenizer is None:
            raise ConfigError(
                "tokenizer.path: name a tokenizer; without local clients the server has no text to train one"
            )
        save_tokenizer(tokenizer, folder.tokenizer)
        _write_facts(folder, None)
        return tokenizer, None
    read, write = _reader(config)
    train, shards, held_out = _dealt(config, read)
    if config.data.client_held_out and min(len(shard) for shard in shards) < 2:
        raise DataError(
            "data.client_held_out: a local client has 1 article, which cannot be both trained on and held out; lower "
            "clients.local, add to data.source, or set data.client_held_out: 0"
        )
    if tokenizer is None:
        tokenizer = _trained(train, config.tokenizer)
    write(folder.held_out, held_out)
    for number, shard in enumerate(shards):
        write(folder.shard(client_name(number)), shard)
    save_tokenizer(tokenizer, folder.tokenizer)
    facts = TextFacts(
        tuple(config.data.source),
        len(train) + len(held_out),
        len(held_out),
        tuple(len(shard) for shard in shards),
        tuple(sum(len(article.text) for article in shard) for shard in shards),
        "examples" if config.task.is_labelled else "articles",
    )
    _write_facts(folder, facts)
    return tokenizer, facts


def _compare_vocabularies(tokenizer: PreTrainedTokenizerFast, path: str, checkpoint: str) -> None:
    """Warn of a tokenizer whose numbers are not those that the checkpoint's rows were trained for.
    Tokens that it adds behind them are no difference.
    """
    from fedbert_ds.data.tokenizer import load_tokenizer

    try:
        trained_for = load_tokenizer(checkpoint).get_vocab()
    except DataError:
        return  # the checkpoint has none, so nobody can tell
    numbers = tokenizer.get_vocab()
    moved = [token for token, number in trained_for.items() if numbers.get(token) != number]
    if moved:
        warn(
            f"tokenizer.path {path} has {len(moved):,} of {len(trained_for):,} tokens of model.checkpoint {checkpoint} "
            f"at another number or not at all ({one_line(moved[0])!r} first): the checkpoint's word table is wrong for "
            "them; drop tokenizer.path to take the checkpoint's own"
        )


def _trained(train: Sequence[Any], section: TokenizerSection) -> PreTrainedTokenizerFast:
    from fedbert_ds.data.byte_bpe import train_byte_bpe
    from fedbert_ds.data.long_steps import telling
    from fedbert_ds.data.tokenizer import Letters, train_wordpiece

    total = sum(len(article.text) for article in train)
    told = telling(train, "text    counted for the tokenizer", lambda article: len(article.text), total)
    if section.kind == "byte_bpe":
        return train_byte_bpe(told, section.vocab_size, lowercase=bool(section.lowercase))
    letters = Letters(section.lowercase is not False, section.strip_accents)
    return train_wordpiece(told, section.vocab_size, letters)


def _reader(
    config: RunConfig,
) -> tuple[Callable[[Sequence[str]], list[Any]], Callable[[Path, Sequence[Any]], None]]:
    """What reads articles, or a task's examples, of some sources, and what writes some of them for
    a client to read.
    """
    from fedbert_ds.data.shards import write_rows, write_shard
    from fedbert_ds.tasks.registry import task_of_section
    from fedbert_ds.tasks.rows import read_rows
    from fedbert_ds.tasks.task import columns_of

    streaming, most, task = config.data.streaming, config.data.max_articles, task_of_section(config.task)
    if task is None:
        return lambda some: _articles(some, config.data), write_shard
    columns = columns_of(task, config.task.text, config.task.label)
    return (
        lambda some: [
            task.example(row, columns, where) for where, row in islice(read_rows(some, streaming=streaming), most)
        ],
        lambda path, examples: write_rows(path, map(task.row, examples)),
    )


def _articles(sources: Sequence[str], data: DataSection) -> list[Article]:
    from fedbert_ds.data.corpus import Reading, read_articles
    from fedbert_ds.data.long_steps import telling
    from fedbert_ds.data.text_files import Encodings

    reading = Reading(data.text_column, Encodings(data.encoding))
    found = read_articles(sources, streaming=data.streaming, max_articles=data.max_articles, reading=reading)
    articles = list(telling(found, "text    reading", lambda article: len(article.text)))
    for sentence in reading.sentences():
        print(f"text    {sentence}", flush=True)
    return articles


def _dealt(
    config: RunConfig, read: Callable[[Sequence[str]], list[Any]]
) -> tuple[list[Any], list[list[Any]], list[Any]]:
    """(articles or examples to train on, the same by local client, held-out ones)."""
    from fedbert_ds.data.shards import deal, hold_out

    data, seed = config.data, config.run.seed
    if data.shards != "source":
        train, held_out = hold_out(read(data.source), data.held_out, seed)
        return train, deal(train, config.clients.local, data.shards, data.alpha, seed), held_out
    shards, held_out = [], []
    for source in data.source:
        articles = read([source])
        try:
            train, apart = hold_out(articles, data.held_out, seed)
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
        shards.append(train)
        held_out += apart
    return [article for shard in shards for article in shard], shards, held_out


def is_prepared(folder: RunFolder) -> bool:
    """Whether `prepare_text` came to its end. A run that was killed before that prepares again."""
    # Runs of earlier versions, without local clients, have no such file.
    return folder.text_facts.is_file() or bool(folder.checkpoints.complete_windows())


def prepared_text(folder: RunFolder) -> tuple[PreTrainedTokenizerFast, TextFacts | None]:
    """Read what `prepare_text` wrote, for a resumed run."""
    from fedbert_ds.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder.tokenizer))
    path = folder.text_facts
    if not path.is_file():
        return tokenizer, None
    return tokenizer, _FACTS.validate_json(path.read_bytes())


def _write_facts(folder: RunFolder, facts: TextFacts | None) -> None:
    write_text(folder.text_facts, _FACTS.dump_json(facts).decode())


_FACTS: TypeAdapter[TextFacts | None] = TypeAdapter(TextFacts | None)
