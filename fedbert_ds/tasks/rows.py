"""Rows of labelled files: tables, .conll, or data sets of the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fedbert_ds.data.corpus import load_hub
from fedbert_ds.data.folders import find
from fedbert_ds.data.table_files import TABLE_FORMS, Place, is_table, rows_of
from fedbert_ds.data.text_files import form_of, lines_of
from fedbert_ds.errors import DataError

TOKENS, TAGS = "tokens", "tags"
"""Columns of .conll files, which have no header."""
CONLL = ".conll"
FORMS = ", ".join((*TABLE_FORMS, CONLL))


def read_rows(sources: Sequence[str], *, streaming: bool = False) -> Iterator[Place]:
    """Rows of all sources in order, the same on every run.

    A source is one of
      .tsv            tab-separated with a header; quotes mean nothing, as in GLUE's files
      .csv            with a header, quoted as spreadsheets do, separated as the header shows
      .jsonl .ndjson  one object a line
      .json           an array of objects
      .parquet .arrow
      .conll          a word a line, its label last, an empty line between sentences (CoNLL 2003);
                      the columns are `tokens` and `tags`
      a folder        every such file under it, by name, but for hidden ones
      `hub:NAME[:CONFIG][:SPLIT]`
    Files may be compressed (.gz, .bz2, .xz, .zst).

    DataError at once for a missing file or an unknown suffix; while reading, for a row that is cut
    short, a line that is not JSON, text of no known encoding, or a source without rows.
    """
    readers = [(name, _reader(name, streaming)) for name in sources]
    return _all_rows(readers)


def _all_rows(readers: list[tuple[str, Callable[[], Iterator[Place]]]]) -> Iterator[Place]:
    for name, read in readers:
        empty = True
        for place in read():
            empty = False
            yield place
        if empty:
            raise DataError(f"{name}: holds no rows; remove it or put labelled examples in it")


def _reader(name: str, streaming: bool) -> Callable[[], Iterator[Place]]:
    if name.startswith("hub:"):
        return lambda: ((f"{name}: row {n}", row) for n, row in enumerate(load_hub(name, streaming), start=1))
    path = Path(name).expanduser()
    if path.is_dir():
        files = find(path, _is_readable).files
        if not files:
            raise DataError(f"{name}: no {FORMS} file in this folder; name another")
        return lambda: (place for file in files for place in _rows(file))
    if not path.exists():
        raise DataError(f"{name}: no such file or folder; name one with labelled examples, or hub:NAME")
    if not _is_readable(path):
        raise DataError(f"{name}: not in a form for labelled examples; use {FORMS}, or hub:NAME")
    return lambda: _rows(path)


def _is_readable(path: Path) -> bool:
    return is_table(path) or form_of(path) == CONLL


def _rows(path: Path) -> Iterator[Place]:
    return _conll(path) if form_of(path) == CONLL else rows_of(path)


def _conll(path: Path) -> Iterator[Place]:
    words: list[str] = []
    tags: list[str] = []
    first = 1
    for number, line in enumerate((*lines_of(path), ""), start=1):
        fields = line.split()
        if fields and fields[0] != "-DOCSTART-":
            if len(fields) < 2:
                raise DataError(f"{path}: line {number} has no label behind its word; mend the line")
            first = first if words else number
            words.append(fields[0])
            tags.append(fields[-1])
        elif words:
            yield f"{path}: line {first}", {TOKENS: words, TAGS: tags}
            words, tags = [], []
