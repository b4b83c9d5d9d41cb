"""Articles from Python's documentation, files, folders, or data sets of the Hugging Face hub."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedbert_ds.data.folders import find
from fedbert_ds.data.python_docs import python_documentation
from fedbert_ds.data.table_files import TABLE_FORMS, is_table, rows_of
from fedbert_ds.data.text_files import COMPRESSIONS, REPLACED, Encodings, form_of, lines_of
from fedbert_ds.errors import DataError

_SPLIT_NAME = re.compile(r"(train|training|validation|valid|dev|test|eval|unsupervised)(\[.*\])?$")
_HEADING = re.compile(r"= .+ =$")
_SUBHEADING = re.compile(r"= = .+ = =$")
_DOC = re.compile(r"<doc\b[^>]*>\s*$")
_DOC_TITLE = re.compile(r'\btitle="([^"]*)"')
_WIKI_EXTRACT = re.compile(r"wiki_\d+(\.(gz|bz2|xz|zst))?")
"""Names of WikiExtractor's files."""
_JOINED = re.compile(r" @([-,.])@ ")


LONGEST_WORD = 1000
"""Characters. Longer ones are worth telling: a word piece tokenizer makes [UNK] of them."""
LONGEST_DOCUMENT = 1 << 24
"""Characters of a document of a text file; a longer one is divided where a line ends."""
_LONGEST_NAME, _NAMES_TOLD = 40, 3
"""Characters of a column's name, and names."""
TEXT, TITLE = "text", "title"
"""Columns of tables."""
_TEXT_FORMS = (".txt", ".tokens", ".raw")
FORMS = ", ".join((*_TEXT_FORMS, *TABLE_FORMS))


@dataclass(frozen=True)
class Article:
    """One document: the unit that is dealt to clients and held out."""

    title: str
    text: str


class HasText(Protocol):
    """What is dealt to clients and held out: an article, or a labelled example."""

    @property
    def text(self) -> str:
        """All of its text."""


Item = TypeVar("Item", bound=HasText)


@dataclass
class Reading:
    """How text is to be found in files, and what became of them."""

    text_column: str | None = None
    """Column or key that holds the text; None: `text`, in any case, or the only column."""
    encodings: Encodings = field(default_factory=Encodings)
    left_out: Counter[str] = field(default_factory=Counter)
    """Files and rows that were not read, by reason."""
    files: int = 0
    """Files that were read, or are being read."""
    only_columns: dict[str, None] = field(default_factory=dict)
    """Names of columns, of tables that have no other, whose name nobody gave; a few."""
    divided: int = 0
    """Places where documents longer than LONGEST_DOCUMENT were divided."""
    articles: int = 0
    characters: int = 0
    longest_word: int = 0
    """Characters."""

    def sentences(self) -> list[str]:
        """What its owner should know, but for numbers of articles and characters."""
        told = []
        if self.only_columns:
            names = ", ".join(f"`{name[:_LONGEST_NAME]}`" for name in self.only_columns)
            told.append(f"the text is in a table's only column, which the first line calls {names}")
        if self.encodings.replaced:
            told.append(f"{self.encodings.replaced:,} characters could not be decoded")
        if self.longest_word > LONGEST_WORD:
            told.append(f"the longest word has {self.longest_word:,} characters")
        if self.divided:
            told.append(
                f"documents of more than {LONGEST_DOCUMENT:,} characters were divided, in {self.divided:,} places"
            )
        if self.left_out:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.left_out.items()))
            told.append(f"left out: {reasons}")
        return told


def read_articles(
    source: Sequence[str], *, streaming: bool = False, max_articles: int | None = None, reading: Reading | None = None
) -> Iterator[Article]:
    """Articles of all sources in order, the same on every run; blank ones are left out.

    A source is one of
      `python-docs`                  the documentation that comes with Python;
      a .txt file                    one article, or one between blank lines each (BERT's format);
      a table                        .csv, .tsv, .jsonl, .ndjson, .json, .parquet, .arrow: an
                                     article a row, in the column `text` or that of `reading`, its
                                     title in the column `title`;
      .tokens, .raw                  WikiText;
      wiki_NN                        WikiExtractor's files: JSON lines, or <doc> elements;
      a folder                       every such file under it, by name, but for hidden ones; here a
                                     .txt file is one article, and .json is read if nothing else is;
      `hub:NAME[:CONFIG][:SPLIT]`    a data set of the hub, or a folder that `datasets` can read. A
                                     lone second part is a split if named like one (train, test,
                                     validation, ...), else a configuration. The split is `train`
                                     by default. `streaming` needs no complete download.
    Files may be compressed (.gz, .bz2, .xz, .zst). Rows of WikiText (one row a line) are
    joined into articles. Rows without text are left out; binary text is decoded. `reading` says
    how, and counts what was left out.

    DataError at once for a missing file, an unknown suffix or an empty folder. While reading,
    DataError for text whose encoding does not show, lines that are not JSON, a missing text column,
    a source without text, or a package that is not installed.
    """
    reading = reading or Reading()
    readers = [(name, _reader(name, streaming, reading)) for name in source]
    return itertools.islice(_all_articles(readers, reading), max_articles)


def _all_articles(readers: list[tuple[str, Callable[[], Iterator[Article]]]], reading: Reading) -> Iterator[Article]:
    for name, read in readers:
        empty = True
        for article in read():
            if not article.text.strip():
                reading.left_out["blank articles"] += 1
                continue
            empty = False
            article = Article(_encodable(article.title), _encodable(article.text))
            reading.articles += 1
            reading.characters += len(article.text)
            reading.longest_word = max(reading.longest_word, *map(len, article.text.split()))
            yield article
        if empty:
            raise DataError(f"{name}: holds no text; remove it from data.source or put text in it")


def _reader(name: str, streaming: bool, reading: Reading) -> Callable[[], Iterator[Article]]:
    """The reader of a source; mistakes that show without reading are raised here."""
    if name == "python-docs":
        return lambda: (Article(title, text) for title, text in python_documentation())
    if name.startswith("hub:"):
        return lambda: _read_hub(name, streaming, reading)
    files, is_alone = _files(name, reading)
    return lambda: itertools.chain.from_iterable(_read_file(file, reading, is_alone) for file in files)


def _files(name: str, reading: Reading) -> tuple[list[Path], bool]:
    """The files of a source that is a path, and whether it is one file; DataError if none is there
    to be read. Others are counted.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        found = find(path, lambda file: _is_readable(file) and form_of(file) != ".json")
        if not found.files:
            found = find(path, _is_readable)
        if not found.files:
            raise DataError(f"{name}: no file of text in this folder ({FORMS}); name another in data.source")
        reading.left_out.update({f"file{'s' * (n > 1)} ({why})": n for why, n in found.left_out.items()})
        return found.files, False
    if not path.exists():
        raise DataError(f"{name}: no such file or folder; name one in data.source, or python-docs, or hub:NAME")
    if not path.is_file():
        raise DataError(f"{name}: is no file, and text is read twice; save it in one")
    if not _is_readable(path):
        raise DataError(f"{name}: cannot read {path.suffix or 'a file without suffix'}; use {FORMS}")
    return [path], True


def identity_of(source: Sequence[str]) -> list[Any] | None:
    """What says, without reading them, that sources hold the text that they held before: path, size
    and time of the last change of every file, and how many files are left out.

    None where nothing says it: of the documentation of Python, of a data set that is in no file.
    DataError as `read_articles` at once.
    """
    known: list[Any] = []
    for name in source:
        left_out = Reading()
        if name == "python-docs":
            return None
        if name.startswith("hub:"):
            files = [Path(file["filename"]) for file in getattr(load_hub(name, False), "cache_files", ())]
        else:
            files, _ = _files(name, left_out)
        if not files:
            return None
        try:
            facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        except OSError:
            return None
        known.append([name, facts, sorted(left_out.left_out.items())])
    return known


def _is_readable(path: Path) -> bool:
    return is_table(path) or form_of(path) in _TEXT_FORMS or _WIKI_EXTRACT.fullmatch(path.name) is not None


def _read_file(path: Path, reading: Reading, is_alone: bool) -> Iterator[Article]:
    reading.files += 1
    if is_table(path):
        columns = lambda names: _columns(str(path), names, reading)  # noqa: E731
        places = rows_of(path, columns, reading.encodings)
        return _articles_of_rows((row for _, row in places), _stem(path), str(path), reading)
    lines = lines_of(path, encodings=reading.encodings)
    if _WIKI_EXTRACT.fullmatch(path.name):
        return _wiki_extract(path, lines, reading)
    if form_of(path) == ".txt":
        return _documents(_stem(path), lines, reading) if is_alone else _one_document(_stem(path), lines, reading)
    return _wikitext_articles(lines)


def _stem(path: Path) -> str:
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSIONS else path.stem


def _documents(name: str, lines: Iterable[str], reading: Reading) -> Iterator[Article]:
    """Documents between blank lines, each named after its first line's number."""
    document: list[str] = []
    first = characters = 0
    for number, line in enumerate(itertools.chain(lines, [""]), start=1):
        is_full = characters > LONGEST_DOCUMENT
        if document and (is_full or not line.strip()):
            reading.divided += is_full
            yield Article(f"{name}:{first}", "".join(document).strip())
            document, characters = [], 0
        if line.strip():
            first = first if document else number
            document.append(line)
            characters += len(line)


def _one_document(name: str, lines: Iterable[str], reading: Reading) -> Iterator[Article]:
    """All lines as one document, unless it is too long."""
    document: list[str] = []
    characters = parts = 0
    for line in lines:
        if characters > LONGEST_DOCUMENT:
            parts += 1
            yield Article(f"{name}:{parts}", "".join(document).strip())
            document, characters = [], 0
        document.append(line)
        characters += len(line)
    reading.divided += parts
    yield Article(f"{name}:{parts + 1}" if parts else name, "".join(document).strip())


def _wiki_extract(path: Path, lines: Iterator[str], reading: Reading) -> Iterator[Article]:
    """What WikiExtractor writes: a JSON object a line, or text between <doc ...> and </doc>."""
    first = next((line for line in lines if line.strip()), "")
    everything = itertools.chain([first], lines)
    if first.lstrip().startswith("{"):
        rows = (_parsed(path, line) for line in everything if line.strip())
        yield from _articles_of_rows(rows, path.name, str(path), reading)
        return
    title, document = path.name, list[str]()
    for line in everything:
        if _DOC.match(line):
            found = _DOC_TITLE.search(line)
            title, document = found.group(1) if found else path.name, []
        elif line.strip() == "</doc>":
            yield Article(title, "".join(document).strip())
            document = []
        else:
            document.append(line)
    if document:
        yield Article(title, "".join(document).strip())


def _parsed(path: Path, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}: a line is not JSON ({error}); one object a line is needed") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}: a line is no JSON object; objects with a key for the text are needed")
    return row


def _read_hub(source: str, streaming: bool, reading: Reading) -> Iterator[Article]:
    rows = load_hub(source, streaming)
    yield from _articles_of_rows(rows, parse_hub_name(source)[0].rsplit("/", 1)[-1], source, reading)


def load_hub(source: str, streaming: bool) -> Any:
    """The rows of `hub:NAME[:CONFIG][:SPLIT]`, to iterate over; DataError where there are none."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{source}: reading hub data sets needs datasets; pip install fedbert-ds[data]") from error
    name, configuration, split = parse_hub_name(source)
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)
            return rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        return datasets.load_dataset(name, configuration, split=split, streaming=streaming)
    except Exception as error:  # datasets, hub, network and file errors share no base
        raise DataError(f"{source}: cannot load it: {error}; the form is hub:NAME[:CONFIG][:SPLIT]") from error


def parse_hub_name(source: str) -> tuple[str, str | None, str]:
    """(name, configuration, split) of `hub:NAME[:CONFIG][:SPLIT]`; DataError for another form."""
    # A split may be sliced, train[:1%], so a colon inside brackets does not separate.
    name, *rest = re.split(r":(?![^\[]*\])", source.removeprefix("hub:"))
    if not name or len(rest) > 2 or "" in rest:
        raise DataError(f"{source}: not a name of a hub data set; the form is hub:NAME[:CONFIG][:SPLIT]")
    if len(rest) == 2:
        return name, rest[0], rest[1]
    if rest and not _SPLIT_NAME.match(rest[0]):
        return name, rest[0], "train"
    return name, None, rest[0] if rest else "train"


def _columns(source: str, names: Sequence[str], reading: Reading) -> list[str]:
    return [_text_column(source, names, reading), *(name for name in names if name == TITLE)]


def _text_column(source: str, names: Sequence[str], reading: Reading) -> str:
    """The column that holds the text; DataError if that cannot be known."""
    if reading.text_column is not None:
        if reading.text_column in names:
            return reading.text_column
        raise DataError(f"{source}: no column `{reading.text_column}` (data.text_column); there are {', '.join(names)}")
    alike = [name for name in names if name.strip().lower() == TEXT]
    if TEXT in names or len(alike) == 1:
        return TEXT if TEXT in names else alike[0]
    if len(names) == 1:
        if len(reading.only_columns) < _NAMES_TOLD:
            reading.only_columns[names[0]] = None
        return names[0]
    raise DataError(f"{source}: no column `text` (columns: {', '.join(names)}); name it in data.text_column")


def _articles_of_rows(rows: Iterable[Mapping[str, Any]], name: str, source: str, reading: Reading) -> Iterator[Article]:
    """An article a row, or WikiText's if the first row with text is a WikiText title."""
    numbered = (
        (number, article)
        for number, row in enumerate(rows, start=1)
        if (article := _article(row, f"{name}:{number}", source, reading)) is not None
    )
    first = next(numbered, None)
    if first is None:
        return
    everything = itertools.chain([first], numbered)
    if _is_title(first[1].text):
        yield from _wikitext_articles(article.text for _, article in everything)
    else:
        yield from (article for _, article in everything)


def _article(row: Mapping[str, Any], untitled: str, source: str, reading: Reading) -> Article | None:
    """The article of a row; None, counted, for one without text."""
    # Rows of JSON need not have the same keys.
    text = row.get(_text_column(source, list(row), reading))
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
        reading.encodings.replaced += text.count(REPLACED)
    if text is None or (isinstance(text, str) and not text.strip()):
        reading.left_out["rows without text"] += 1
        return None
    if not isinstance(text, str):
        raise DataError(f"{source}: row {untitled} holds {type(text).__name__} and no text; name another column: "
                        "data.text_column")  # fmt: skip
    title = row.get(TITLE)
    return Article(title if isinstance(title, str) and title else untitled, text)


def _is_title(line: str) -> bool:
    line = line.strip()
    return bool(_HEADING.match(line)) and not _SUBHEADING.match(line)


def _wikitext_articles(lines: Iterable[str]) -> Iterator[Article]:
    """Articles of WikiText's lines: ` = Title = ` opens one; those before the first do too."""
    title, paragraphs = "", list[str]()
    for line in lines:
        if _is_title(line):
            if paragraphs:
                yield Article(title, "\n".join(paragraphs))
            title, paragraphs = line.strip().removeprefix("= ").removesuffix(" ="), []
        elif line.strip():
            paragraphs.append(_JOINED.sub(r"\1", line.strip()))
    if paragraphs:
        yield Article(title, "\n".join(paragraphs))


def _encodable(text: str) -> str:
    """The text without lone surrogates, which JSON may carry and no tokenizer accepts."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
