"""Articles from Python's documentation, files, folders, or data sets of the Hugging Face hub."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedbert_ds.data.python_docs import python_documentation
from fedbert_ds.errors import DataError

_SPLIT_NAME = re.compile(r"(train|training|validation|valid|dev|test|eval|unsupervised)(\[.*\])?$")
_HEADING = re.compile(r"= .+ =$")
_SUBHEADING = re.compile(r"= = .+ = =$")
_JOINED = re.compile(r" @([-,.])@ ")


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


def read_articles(
    source: Sequence[str], *, streaming: bool = False, max_articles: int | None = None
) -> Iterator[Article]:
    """Articles of all sources in order, the same on every run; blank ones are skipped.

    A source is one of
      `python-docs`                  the documentation that comes with Python;
      a file                         .txt (one article), .jsonl (key `text`, optional `title`, one
                                     article a line), .parquet (column `text`, optional `title`),
                                     .tokens or .raw (WikiText);
      a folder                       every such file under it, by name;
      `hub:NAME[:CONFIG][:SPLIT]`    a data set of the hub, or a folder that `datasets` can read. A
                                     lone second part is a split if named like one (train, test,
                                     validation, ...), else a configuration. The split is `train`
                                     by default. `streaming` needs no complete download.
    Rows of WikiText (one row a line) are joined into articles.

    DataError at once for a missing file, an unknown suffix or an empty folder. While reading,
    DataError for text that is not UTF-8, lines that are not JSON, a missing `text` column, a source
    without text, or a package that is not installed.
    """
    readers = [(name, _reader(name, streaming)) for name in source]
    return itertools.islice(_all_articles(readers), max_articles)


def read_jsonl(path: Path) -> Iterator[Article]:
    """Articles of a .jsonl file, one a line; DataError for a line without a string `text`."""
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number} is not JSON ({error}); one object a line is needed") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f'{path}: line {number} has no string under "text"; rename the key that holds the text')
        yield _article(row, f"{path.stem}:{number}")


def _all_articles(readers: list[tuple[str, Callable[[], Iterator[Article]]]]) -> Iterator[Article]:
    for name, read in readers:
        empty = True
        for article in read():
            if article.text.strip():
                empty = False
                yield Article(_encodable(article.title), _encodable(article.text))
        if empty:
            raise DataError(f"{name}: holds no text; remove it from data.source or put text in it")


def _reader(name: str, streaming: bool) -> Callable[[], Iterator[Article]]:
    """The reader of a source; mistakes that show without reading are raised here."""
    if name == "python-docs":
        return lambda: (Article(title, text) for title, text in python_documentation())
    if name.startswith("hub:"):
        return lambda: _read_hub(name, streaming)
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _FILE_READERS and file.is_file())
        if not files:
            raise DataError(f"{name}: no {_suffixes()} file in this folder; name another in data.source")
        return lambda: itertools.chain.from_iterable(_FILE_READERS[file.suffix.lower()](file) for file in files)
    if not path.exists():
        raise DataError(f"{name}: no such file or folder; name one in data.source, or python-docs, or hub:NAME")
    if path.suffix.lower() not in _FILE_READERS:
        raise DataError(f"{name}: cannot read {path.suffix or 'a file without suffix'}; use {_suffixes()}")
    return lambda: _FILE_READERS[path.suffix.lower()](path)


def _read_text(path: Path) -> Iterator[Article]:
    yield Article(path.stem, "".join(lines_of(path)).strip())


def _read_wikitext(path: Path) -> Iterator[Article]:
    return _wikitext_articles(lines_of(path))


def _read_parquet(path: Path) -> Iterator[Article]:
    def columns_of(names: Sequence[str]) -> list[str]:
        _require_text_column(str(path), names)
        return [name for name in ("text", "title") if name in names]

    return _articles_of_rows(parquet_rows(path, columns_of), path.stem)


def parquet_rows(path: Path, columns_of: Callable[[Sequence[str]], list[str]] = list) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, of the columns that `columns_of` chooses among the file's.

    DataError for a file that cannot be read, or without pyarrow.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow; pip install fedbert-ds[data]") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = columns_of(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); write it again") from error


def _read_hub(source: str, streaming: bool) -> Iterator[Article]:
    rows = load_hub(source, streaming)
    # The first row tells, since a streamed set may not know its columns.
    _require_text_column(source, list(next(iter(rows), {"text": ""})))
    yield from _articles_of_rows(rows, parse_hub_name(source)[0].rsplit("/", 1)[-1])


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
        raise DataError(f"{source}: the form is hub:NAME[:CONFIG][:SPLIT]")
    if len(rest) == 2:
        return name, rest[0], rest[1]
    if rest and not _SPLIT_NAME.match(rest[0]):
        return name, rest[0], "train"
    return name, None, rest[0] if rest else "train"


def _require_text_column(source: str, names: Sequence[str]) -> None:
    if "text" not in names:
        raise DataError(f"{source}: no column `text` (columns: {', '.join(names)}); rename the one that holds the text")


def _articles_of_rows(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Article]:
    """An article a row, or WikiText's if the first row with text is a WikiText title."""
    numbered = (
        (number, row)
        for number, row in enumerate(rows, start=1)
        if isinstance(row["text"], str) and row["text"].strip()
    )
    first = next(numbered, None)
    if first is None:
        return
    everything = itertools.chain([first], numbered)
    if _is_title(first[1]["text"]):
        yield from _wikitext_articles(row["text"] for _, row in everything)
    else:
        yield from (_article(row, f"{name}:{number}") for number, row in everything)


def _article(row: Mapping[str, Any], untitled: str) -> Article:
    title = row.get("title")
    return Article(title if isinstance(title, str) and title else untitled, row["text"])


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


def lines_of(path: Path, newline: str | None = None) -> Iterator[str]:
    """Lines of a UTF-8 file; `newline` as `open` has it. DataError for a file that is none."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield from file
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); convert it") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _encodable(text: str) -> str:
    """The text without lone surrogates, which JSON may carry and no tokenizer accepts."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


_FILE_READERS: dict[str, Callable[[Path], Iterator[Article]]] = {
    ".txt": _read_text,
    ".jsonl": read_jsonl,
    ".parquet": _read_parquet,
    ".tokens": _read_wikitext,
    ".raw": _read_wikitext,
}


def _suffixes() -> str:
    return ", ".join(_FILE_READERS)
