"""The options of every `fedbert-ds vocab NAME`, and what each does."""

from __future__ import annotations

import argparse
import socket

from fedbert_ds.user_path import expanded, user_path

Subcommands = argparse._SubParsersAction
REPORT = "revealed.md"
"""In the folder of a merged vocabulary: what each owner revealed for it."""


def add_vocab(subcommands: Subcommands[argparse.ArgumentParser]) -> None:
    """Add `vocab` and its steps to the command line."""
    parser = subcommands.add_parser("vocab", help="one vocabulary for many owners, from their word counts")
    steps = parser.add_subparsers(dest="vocab", required=True, metavar="STEP")

    count = steps.add_parser("count", help="an owner: count the words of your text")
    count.add_argument("--data", required=True, nargs="+", type=expanded, metavar="PATH", help="text, as for a client")
    count.add_argument("--id", default=socket.gethostname(), help="the owner's name (default: host name)")
    count.add_argument("--minimum-count", type=int, default=1, metavar="N", help="leave out words that occur less (1)")
    count.add_argument("--top", type=int, metavar="N", help="the N most frequent words only")
    count.add_argument("--no-digits", action="store_true", help="leave out words with digits: dates, numbers, codes")
    _add_out(count, "FILE.json", "the counts")
    count.set_defaults(run=_count)

    digests = steps.add_parser("digest", help="an owner: keyed digests of your words, which name none")
    digests.add_argument("--counts", type=user_path, required=True, metavar="FILE.json", help="of vocab count")
    _add_key(digests)
    _add_out(digests, "FILE.json", "the digests")
    digests.set_defaults(run=_digest)

    common = steps.add_parser("common", help="the server: digests that enough owners have")
    common.add_argument(
        "digests", type=user_path, nargs="+", metavar="FILE.json", help="of vocab digest, one of each owner"
    )
    _add_least(common)
    _add_out(common, "FILE.json", "the common digests")
    common.set_defaults(run=_common)

    select = steps.add_parser("select", help="an owner: counts of your words that are common")
    select.add_argument("--counts", type=user_path, required=True, metavar="FILE.json", help="of vocab count")
    select.add_argument("--common", type=user_path, required=True, metavar="FILE.json", help="of vocab common")
    _add_key(select)
    _add_out(select, "FILE.json", "the selected counts")
    select.set_defaults(run=_select)

    merge = steps.add_parser("merge", help="the server: a WordPiece vocabulary from all owners' counts")
    merge.add_argument(
        "counts", type=user_path, nargs="+", metavar="FILE.json", help="of vocab count or select, one each"
    )
    _add_least(merge)
    merge.add_argument("--size", type=int, default=30_522, metavar="N", help="word pieces at most (30522, as BERT)")
    _add_out(merge, "DIR", "a new folder, for tokenizer.path")
    merge.set_defaults(run=_merge)


def _add_out(parser: argparse.ArgumentParser, metavar: str, what: str) -> None:
    parser.add_argument("--out", type=user_path, required=True, metavar=metavar, help=what)


def _add_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key", type=user_path, required=True, metavar="FILE", help="the owners' key, not the server's"
    )


def _add_least(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--least", type=int, required=True, metavar="K", help="a word counts if K owners have it")


def _count(options: argparse.Namespace) -> None:
    # Imported here, as below: a mistyped command must not wait.
    from fedbert_ds.data.corpus import read_articles
    from fedbert_ds.data.long_steps import telling
    from fedbert_ds.data.tokenizer import count_words
    from fedbert_ds.errors import ConfigError, DataError
    from fedbert_ds.vocabulary.counts import WordCounts, restrict, write_counts

    if options.minimum_count < 1 or (options.top is not None and options.top < 1):
        raise ConfigError("--minimum-count and --top are numbers from 1 on; raise them")
    if not options.id.strip():
        raise ConfigError("--id is empty; give the owner's name")
    articles = telling(read_articles(options.data), "counting words", lambda article: len(article.text))
    everything = count_words(article.text for article in articles)
    words = restrict(everything, options.minimum_count, options.top, digits=not options.no_digits)
    if not words:
        raise DataError("no word is left to count; add text to --data or restrict it less")
    write_counts(options.out, WordCounts(options.id, words))
    once, digits = sum(count == 1 for count in words.values()), len(words) - len(restrict(words, digits=False))
    print(f"counted {len(words):,} of {len(everything):,} words, {sum(words.values()):,} occurrences: {options.out}")
    print(
        f"Whoever reads this file learns these words and how often you use each. {once:,} occur once, {digits:,} have "
        "digits: names and codes are among them. --minimum-count, --top and --no-digits leave words out; with vocab "
        "digest, common and select no word leaves you that too few others have."
    )


def _digest(options: argparse.Namespace) -> None:
    from fedbert_ds.vocabulary.counts import read_counts
    from fedbert_ds.vocabulary.digests import WordDigests, digests_of, read_key, write_digests

    counts = read_counts(options.counts)
    write_digests(options.out, WordDigests(counts.owner, digests_of(counts.words, read_key(options.key))))
    print(f"digests of {len(counts.words):,} words, without counts: {options.out}")
    print(
        "Whoever reads this file without the key learns how many words you have, and with others' files how many of "
        "them are theirs, too. Whoever has the key can test any word against it: give it to the server alone, who must "
        "not have the key."
    )


def _common(options: argparse.Namespace) -> None:
    from fedbert_ds.vocabulary.digests import common_digests, read_digests, write_common

    owners = [read_digests(path) for path in options.digests]
    common = common_digests(owners, options.least)
    write_common(options.out, common, options.least)
    print(f"{len(common):,} words are {options.least} of {len(owners)} owners': {options.out}")


def _select(options: argparse.Namespace) -> None:
    from fedbert_ds.errors import DataError
    from fedbert_ds.vocabulary.counts import WordCounts, read_counts, write_counts
    from fedbert_ds.vocabulary.digests import read_common, read_key, select

    counts = read_counts(options.counts)
    words = select(counts.words, read_key(options.key), read_common(options.common))
    if not words:
        raise DataError("no word of yours is common; do all owners have the same --key?")
    write_counts(options.out, WordCounts(counts.owner, words, selected=True))
    print(f"selected {len(words):,} of {len(counts.words):,} words, with counts: {options.out}")


def _merge(options: argparse.Namespace) -> None:
    from fedbert_ds.atomic_write import write_text
    from fedbert_ds.data.tokenizer import SMALLEST_VOCABULARY, wordpiece_of_counts
    from fedbert_ds.errors import ConfigError, DataError
    from fedbert_ds.telemetry.tables import markdown
    from fedbert_ds.tokenizer_folder import save_tokenizer
    from fedbert_ds.vocabulary.counts import merge_counts, read_counts, revealed

    if options.size < SMALLEST_VOCABULARY:
        raise ConfigError(f"--size {options.size} is too small; use {SMALLEST_VOCABULARY} or more")
    if options.out.exists():
        raise DataError(f"{options.out}: exists; give --out a new folder")
    counts = [read_counts(path) for path in options.counts]
    merged = merge_counts(counts, options.least)
    tokenizer = wordpiece_of_counts(merged, options.size)
    save_tokenizer(tokenizer, options.out)
    heads = ["owner", "how", "words in plain, with counts", "used", "of no other owner"]
    rows = [
        [
            one.owner,
            "common ones" if one.selected else "all counted",
            f"{one.words:,}",
            f"{one.used:,}",
            f"{one.alone:,}",
        ]
        for one in revealed(counts, merged)
    ]
    table = markdown(heads, rows, words=2)
    write_text(options.out / REPORT, table + "\n")
    print(
        f"{len(tokenizer):,} word pieces from {len(merged):,} words that {options.least} of {len(counts)} owners have"
    )
    print(f"\n{table}\n\ntokenizer  {options.out}   tokenizer.path: {options.out}")
