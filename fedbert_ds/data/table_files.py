"""Rows of table files: .csv, .tsv, .jsonl and .ndjson, .json, .parquet, .arrow; each with its place
for errors.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from fedbert_ds.data.text_files import Encodings, form_of, lines_of, whole
from fedbert_ds.errors import DataError

Row = dict[str, Any]
Place = tuple[str, Row]
"""Where a row stands, for errors, and the row."""
Columns = Callable[[Sequence[str]], Sequence[str]]
"""Chooses among a file's columns, where a file can leave the others unread."""

SEPARATORS = ",;\t|"
"""Between the fields of a .csv file; spreadsheets of many countries write semicolons."""
LONGEST_FIELD = 1 << 24
"""Characters of a field of a .csv file. With more, a quote was hardly meant to be open so long."""
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\r?\n?$')
"""How Excel says, in a line before the header, what stands between fields."""
_END = "\ue000the end\ue000"
"""A row behind the last one, which shows that no quote is open there."""


def rows_of(path: Path, columns: Columns = list, encodings: Encodings | None = None) -> Iterator[Place]:
    """Rows of a table file. DataError for a damaged file, a cut-off row, or a package that is
    missing.
    """
    return _READERS[form_of(path)](path, columns, encodings or Encodings())


def is_table(path: Path) -> bool:
    """Whether a file's name says that it is a table that can be read."""
    return form_of(path) in _READERS


def full_lines(path: Path, encodings: Encodings | None = None) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1. Only a newline ends one: texts hold
    other characters that do.
    """
    for number, line in enumerate(lines_of(path, "\n", encodings), start=1):
        if text := line.removesuffix("\n").removesuffix("\r"):
            yield number, text


def _tsv(path: Path, columns: Columns, encodings: Encodings) -> Iterator[Place]:
    # Quotes mean nothing, as in GLUE's files.
    lines = full_lines(path, encodings)
    header = next(lines, (1, ""))[1].split("\t")
    for number, line in lines:
        yield _fitted(path, number, header, line.split("\t"))


def _csv(path: Path, columns: Columns, encodings: Encodings) -> Iterator[Place]:
    csv.field_size_limit(LONGEST_FIELD)
    lines = lines_of(path, "", encodings)
    first = next(lines, "")
    before = 0
    if (said := _SEPARATOR_LINE.match(first)) is not None:
        before, first = 1, next(lines, "")
    separator = said.group(1) if said is not None else max(SEPARATORS, key=first.count)
    rows = csv.reader(chain([first], lines, ["\n", _END]), delimiter=separator)
    header: list[str] | None = None
    begin = 1
    try:
        for fields in rows:
            if fields == [_END]:
                return
            begin, number = rows.line_num + 1, begin
            if fields and fields[-1].endswith(_END):
                raise DataError(f"{path}: a quote that line {number + before} opens is never closed; close it")
            if header is None:
                header = fields
            elif fields:
                yield _fitted(path, rows.line_num + before, header, fields)
    except csv.Error as error:
        raise DataError(
            f"{path}: line {rows.line_num + before} is not CSV ({error}); mend the line, or a quote before it that is "
            "never closed"
        ) from error


def _fitted(path: Path, number: int, header: list[str], fields: list[str]) -> Place:
    # What is empty beyond the header comes of separators at the end of lines.
    if len(fields) < len(header) or any(map(str.strip, fields[len(header) :])):
        raise DataError(
            f"{path}: line {number} has {len(fields)} fields, the header {len(header)}; mend the line, in .csv by "
            "quotes around text that holds separators"
        )
    return f"{path}: line {number}", dict(zip(header, fields, strict=False))


def _json_lines(path: Path, columns: Columns, encodings: Encodings) -> Iterator[Place]:
    for number, line in enumerate(lines_of(path, encodings=encodings), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number} is not JSON ({error}); one object a line is needed") from error
        yield f"{path}: line {number}", _object(path, f"line {number}", row)


def _json(path: Path, columns: Columns, encodings: Encodings) -> Iterator[Place]:
    """An array of objects, alone or as the one array of an object; or objects, one a line."""
    text = "".join(lines_of(path, encodings=encodings))
    try:
        document: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and "\n" in text.strip():
            yield from _json_lines(path, columns, encodings)
            return
        raise DataError(f"{path}: not JSON ({error}); an array of objects is needed") from error
    if isinstance(document, dict):
        arrays = [value for value in document.values() if isinstance(value, list)]
        document = arrays[0] if len(arrays) == 1 else [document]
    for number, row in enumerate(document if isinstance(document, list) else [document], start=1):
        yield f"{path}: object {number}", _object(path, f"object {number}", row)


def _object(path: Path, what: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{path}: {what} is no JSON object; objects with a key for the text are needed")
    return row


def _parquet(path: Path, columns: Columns, encodings: Encodings) -> Iterator[Place]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow; pip install fedbert-ds[data]") from error
    try:
        with whole(path) as place, pyarrow.parquet.ParquetFile(place) as file:
            names = list(columns(file.schema_arrow.names))
            batches = file.iter_batches(batch_size=1024, columns=names)
            yield from _numbered(path, (row for batch in batches for row in batch.to_pylist()))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); write it again") from error


def _arrow(path: Path, columns: Columns, encodings: Encodings) -> Iterator[Place]:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f"{path}: reading Arrow needs pyarrow; pip install fedbert-ds[data]") from error
    try:
        # No memory map: what was read of one counts as this process's memory.
        with whole(path) as place, pyarrow.OSFile(str(place)) if place == path else pyarrow.PythonFile(place) as file:
            try:
                batches = iter(pyarrow.ipc.open_stream(file))
            except pyarrow.ArrowInvalid:
                table = pyarrow.ipc.open_file(file)
                batches = (table.get_batch(number) for number in range(table.num_record_batches))
            yield from _numbered(path, _chosen(batches, columns))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Arrow file ({error}); write it again") from error


def _chosen(batches: Iterable[Any], columns: Columns) -> Iterator[Row]:
    for batch in batches:
        chosen = batch.select(list(columns(batch.schema.names)))
        for start in range(0, chosen.num_rows, 1024):
            yield from chosen.slice(start, 1024).to_pylist()


def _numbered(path: Path, rows: Iterable[Row]) -> Iterator[Place]:
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", row


_READERS: dict[str, Callable[[Path, Columns, Encodings], Iterator[Place]]] = {
    ".tsv": _tsv,
    ".csv": _csv,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
TABLE_FORMS = tuple(_READERS)
