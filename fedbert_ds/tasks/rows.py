"""Rows of labelled files: .tsv, .csv, .jsonl, .parquet, .conll, or data sets of the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedbert_ds.data.corpus import lines_of, load_hub, parquet_rows
from fedbert_ds.errors import DataError
from fedbert_ds.tasks.examples import Row

Place = tuple[str, Row]
"""Where a row stands, for errors, and the row."""

TOKENS, TAGS = "tokens", "tags"
"""Columns of .conll files, which have no header."""


def read_rows(sources: Sequence[str], *, streaming: bool = False) -> Iterator[Place]:
    """Rows of all sources in order, the same on every run.

    A source is one of
      .tsv            tab-separated with a header; quotes mean nothing, as in GLUE's files
      .csv            comma-separated with a header, quoted as spreadsheets do
      .jsonl          one object a line
      .parquet
      .conll          a word a line, its label last, an empty line between sentences (CoNLL 2003);
                      the columns are `tokens` and `tags`
      a folder        every such file under it, by name
      `hub:NAME[:CONFIG][:SPLIT]`

    DataError at once for a missing file or an unknown suffix; while reading, for a row that is cut
    short, a line that is not JSON, text that is not UTF-8, or a source without rows.
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
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _READERS and file.is_file())
        if not files:
            raise DataError(f"{name}: no {', '.join(_READERS)} file in this folder; name another")
        return lambda: (place for file in files for place in _READERS[file.suffix.lower()](file))
    if not path.exists():
        raise DataError(f"{name}: no such file or folder; name one with labelled examples, or hub:NAME")
    if path.suffix.lower() not in _READERS:
        raise DataError(f"{name}: labelled examples come as {', '.join(_READERS)}, or hub:NAME")
    return lambda: _READERS[path.suffix.lower()](path)


def _tsv(path: Path) -> Iterator[Place]:
    lines = full_lines(path)
    header = next(lines, (1, ""))[1].split("\t")
    for number, line in lines:
        yield _fitted(path, number, header, line.split("\t"))


def full_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1. Only a newline ends one: texts hold
    other characters that do.
    """
    for number, line in enumerate(lines_of(path, newline="\n"), start=1):
        if text := line.removesuffix("\n").removesuffix("\r"):
            yield number, text


def _csv(path: Path) -> Iterator[Place]:
    rows = csv.reader(lines_of(path, newline=""))
    header = next(rows, [])
    for fields in rows:
        if fields:
            yield _fitted(path, rows.line_num, header, fields)


def _fitted(path: Path, number: int, header: list[str], fields: list[str]) -> Place:
    if len(fields) < len(header):
        raise DataError(f"{path}: line {number} has {len(fields)} fields, the header {len(header)}; mend the line")
    return f"{path}: line {number}", dict(zip(header, fields, strict=False))


def _jsonl(path: Path) -> Iterator[Place]:
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number} is not JSON ({error}); one object a line is needed") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is no JSON object; one object a line is needed")
        yield f"{path}: line {number}", row


def _parquet(path: Path) -> Iterator[Place]:
    for number, row in enumerate(parquet_rows(path), start=1):
        yield f"{path}: row {number}", row


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


_READERS: dict[str, Callable[[Path], Iterator[Place]]] = {
    ".tsv": _tsv,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".conll": _conll,
}
