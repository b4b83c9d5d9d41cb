"""Rows of every kind of table file, compressed or not; damaged ones are one line."""

from __future__ import annotations

import csv
import errno
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.data.test_text_files import COMPRESS, compressed

from fedbert_ds.data import table_files
from fedbert_ds.data.table_files import TABLE_FORMS, is_table, rows_of
from fedbert_ds.errors import DataError

ROWS = [{"id": "1", "text": 'He said: "well; yes",\nand left.'}, {"id": "2", "text": "Ça va | bien"}]
ONE_LINE = [row | {"text": row["text"].replace("\n", " ")} for row in ROWS]


def csv_of(rows: list[dict[str, str]], separator: str) -> str:
    quoted = [['"' + value.replace('"', '""') + '"' for value in row.values()] for row in rows]
    return "".join(separator.join(fields) + "\r\n" for fields in [list(rows[0]), *quoted])


CONTENT = {
    ".tsv": ("id\ttext\n" + "".join(f"{row['id']}\t{row['text']}\n" for row in ONE_LINE), ONE_LINE),
    ".csv": (csv_of(ROWS, ","), ROWS),
    ".jsonl": ("\n".join(json.dumps(row) for row in ROWS), ROWS),
    ".ndjson": ("\n\n".join(json.dumps(row) for row in ROWS), ROWS),
    ".json": (json.dumps(ROWS, indent=1, ensure_ascii=False), ROWS),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("form", CONTENT)
def test_every_form_in_every_compression(tmp_path: Path, form: str, compression: str) -> None:
    text, expected = CONTENT[form]
    path = compressed(tmp_path / f"a{form}{compression}", text.encode())
    assert is_table(path) and [row for _, row in rows_of(path)] == expected


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_header_shows_what_separates_fields(tmp_path: Path, separator: str) -> None:
    path = compressed(tmp_path / "a.csv", csv_of(ROWS, separator).encode("utf-8-sig"))
    assert [row for _, row in rows_of(path)] == ROWS


def test_a_field_may_be_as_long_as_a_book(tmp_path: Path) -> None:
    path = compressed(tmp_path / "a.csv", f"id,text\n1,{'x' * 500_000}\n".encode())
    assert [len(row["text"]) for _, row in rows_of(path)] == [500_000]


@pytest.mark.parametrize("line", ["sep=#\n", "sep=#\r\n", '"sep=#"\r\n'])
def test_excel_says_what_separates_fields_in_a_line_of_its_own(tmp_path: Path, line: str) -> None:
    path = compressed(tmp_path / "a.csv", f"{line}{csv_of(ROWS, '#')}".encode())
    assert [row for _, row in rows_of(path)] == ROWS
    assert next(rows_of(path))[0] == f"{path}: line 4"


def test_a_quote_that_swallows_a_large_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "LONGEST_FIELD", 1000)
    path = compressed(tmp_path / "a.csv", b'id,text\n1,"never closed\n' + b"2,so\n" * 1000)
    with pytest.raises(DataError, match=r"line \d+ is not CSV .*limit.*; mend the line, or a quote before it"):
        list(rows_of(path))


# No control characters but those of text: one in every second place is what UTF-16 without its mark
# looks like.
FIELDS = st.text(st.characters(exclude_categories=["Cc"]) | st.sampled_from("\t\n\r"), max_size=30)


@given(
    rows=st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=8),
    separator=st.sampled_from(table_files.SEPARATORS),
    end=st.sampled_from(["\n", "\r\n"]),
    is_whole=st.booleans(),
)
def test_what_is_written_as_csv_is_read(rows: list[Any], separator: str, end: str, is_whole: bool) -> None:
    # Python's writer puts no quotes around a carriage return.
    rows = [[field.replace("\r", "").encode("utf-8", "replace").decode() for field in row] for row in rows]
    written = io.StringIO()
    csv.writer(written, delimiter=separator, lineterminator=end).writerows([["id", "text"], *rows])
    text = written.getvalue() if is_whole else written.getvalue().removesuffix(end)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        path.write_bytes(text.encode())
        assert [list(row.values()) for _, row in rows_of(path)] == rows


@pytest.mark.parametrize(
    "document", [{"data": ROWS, "version": 1}, {"notes": ROWS}, ROWS[0]], ids=["data", "notes", "one object"]
)
def test_objects_that_hold_the_rows(tmp_path: Path, document: Any) -> None:
    path = compressed(tmp_path / "a.json", json.dumps(document).encode())
    assert [row for _, row in rows_of(path)] == (ROWS if len(document) < 3 and "id" not in document else [document])


def test_a_json_file_may_hold_a_line_for_each_row(tmp_path: Path) -> None:
    path = compressed(tmp_path / "a.json", "\n".join(json.dumps(row) for row in ROWS).encode())
    assert [row for _, row in rows_of(path)] == ROWS


@pytest.mark.parametrize("form", [".parquet", ".arrow stream", ".arrow file"])
def test_columnar_files(tmp_path: Path, form: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table, path = pyarrow.Table.from_pylist(ROWS), tmp_path / f"a{form.split()[0]}"
    if form == ".parquet":
        parquet.write_table(table, path)
    else:
        new = pyarrow.ipc.new_stream if form.endswith("stream") else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)
    assert list(rows_of(path)) == [(f"{path}: row {n}", row) for n, row in enumerate(ROWS, start=1)]
    assert [row for _, row in rows_of(path, lambda names: [name for name in names if name == "id"])] == [
        {"id": "1"},
        {"id": "2"},
    ]
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"not a readable (Parquet|Arrow) file"):
        list(rows_of(path))


@pytest.mark.parametrize("form", [".parquet", ".arrow stream", ".arrow file"])
@pytest.mark.parametrize("compression", COMPRESS)
def test_columnar_files_in_every_compression(tmp_path: Path, form: str, compression: str) -> None:
    pyarrow, out = pytest.importorskip("pyarrow"), io.BytesIO()
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(ROWS)
    if form == ".parquet":
        parquet.write_table(table, out)
    else:
        new = pyarrow.ipc.new_stream if form.endswith("stream") else pyarrow.ipc.new_file
        with new(out, table.schema) as writer:
            writer.write_table(table)
    path = compressed(tmp_path / f"a{form.split()[0]}{compression}", out.getvalue())
    assert is_table(path) and [row for _, row in rows_of(path)] == ROWS
    if compression:
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(DataError, match=r"cannot be decompressed .*; compress it again"):
            list(rows_of(path))


def test_a_full_disk_for_a_decompressed_table_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(packed: Any, content: Any, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    path = compressed(tmp_path / "a.parquet.gz", b"x")
    with pytest.raises(DataError, match=r"No space left on device\); it is decompressed in .*, free some space there"):
        list(rows_of(path))


def test_what_is_a_table() -> None:
    assert not is_table(Path("a.txt")) and not is_table(Path("a.gz"))
    assert all(is_table(Path(f"a{form}")) for form in TABLE_FORMS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,text\n1\n", "line 2 has 1 fields, the header 2; mend the line"),
        ("a.csv", 'id,text\n1,"so\x00"\n', None),
        ("a.csv", "id,text\n1,Fever, cough\n", "line 2 has 3 fields, the header 2; mend the line, in .csv by quotes"),
        ("a.csv", "id,text\n1,so,,\n", None),
        ("a.csv", 'id,text\n1,"so"\n2,"never\n3,so\n', "a quote that line 3 opens is never closed; close it"),
        ("a.csv", 'sep=;\nid;text\n2;"never', "a quote that line 3 opens is never closed; close it"),
        ("a.csv", 'id,"text\n1,so\n', "a quote that line 1 opens is never closed; close it"),
        ("a.tsv", "id\ttext\n1\tso\tit goes\n", "line 2 has 3 fields, the header 2; mend the line"),
        ("a.tsv", "id\ttext\n1\tso\t\t\n", None),
        ("a.tsv", "id\ttext\n1\n", "line 2 has 1 fields"),
        ("a.json", "[1, 2]", "object 1 is no JSON object"),
        ("a.json", "[", "not JSON"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", '"so"', "line 1 is no JSON object"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str, content: str, message: str | None) -> None:
    path = compressed(tmp_path / name, content.encode())
    if message is None:
        assert [row["id"] for _, row in rows_of(path)] == ["1"]
        return
    with pytest.raises(DataError) as told:
        list(rows_of(path))
    assert message in str(told.value) and "\n" not in str(told.value)
