"""Rows of every kind of file, with their places; a damaged file is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedbert_ds.data.table_files import full_lines
from fedbert_ds.errors import DataError
from fedbert_ds.tasks.rows import read_rows

CONTENT = {
    "a.tsv": 'sentence\tlabel\nso "good\t1\n\nbad \u2028 one\t0\t\n',
    "a.csv": 'sentence,label\n"so, ""good""\nand long",1\nbad,0\n',
    "a.jsonl": '{"sentence": "so good", "label": 1}\n\n{"sentence": "bad", "label": 0}\n',
    "a.conll": "-DOCSTART- -X- O O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nPeter NNP B-PER\n",
}
EXPECTED = {
    "a.tsv": [
        ("line 2", {"sentence": 'so "good', "label": "1"}),
        ("line 4", {"sentence": "bad \u2028 one", "label": "0"}),
    ],
    "a.csv": [
        ("line 3", {"sentence": 'so, "good"\nand long', "label": "1"}),
        ("line 4", {"sentence": "bad", "label": "0"}),
    ],
    "a.jsonl": [("line 1", {"sentence": "so good", "label": 1}), ("line 3", {"sentence": "bad", "label": 0})],
    "a.conll": [
        ("line 3", {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}),
        ("line 7", {"tokens": ["Peter"], "tags": ["B-PER"]}),
    ],
}


def written(folder: Path, name: str, content: str) -> str:
    path = folder / name
    path.write_text(content, encoding="utf-8", newline="")
    return str(path)


@pytest.mark.parametrize("name", CONTENT)
def test_rows_of_a_file(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, CONTENT[name])
    assert list(read_rows([path])) == [(f"{path}: {place}", row) for place, row in EXPECTED[name]]


def test_a_folder_is_its_files_by_name(tmp_path: Path) -> None:
    for name, content in CONTENT.items():
        written(tmp_path, name, content)
    written(tmp_path, "notes.txt", "no labels here")
    rows = [row for _, row in read_rows([str(tmp_path)])]
    assert rows == [row for name in sorted(EXPECTED) for _, row in EXPECTED[name]]


def test_parquet_and_a_hub_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "so good", "label": 1}, {"text": "bad", "label": 0}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert [row for _, row in read_rows([str(tmp_path / "a.parquet")])] == rows
    assert [row for _, row in read_rows([f"hub:{tmp_path / 'saved'}"])] == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "sentence\tlabel\nalone\n", "line 2 has 1 fields, the header 2"),
        ("a.tsv", "sentence\tlabel\nso\tgood\t1\n", "line 2 has 3 fields, the header 2"),
        ("a.csv", "sentence,label\nalone\n", "line 2 has 1 fields, the header 2"),
        ("a.csv", "sentence,label\nso, good,1\n", "line 2 has 3 fields, the header 2"),
        ("a.jsonl", "{\n", "line 1 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is no JSON object"),
        ("a.conll", "EU B-ORG\nrejects\n", "line 2 has no label behind its word"),
        ("a.parquet", "none", "not a readable Parquet file"),
        ("a.tsv", "sentence\tlabel\n", "holds no rows"),
        (
            "a.txt",
            "text",
            "not in a form for labelled examples; use .tsv, .csv, .jsonl, .ndjson, .json, .parquet, .arrow, .conll, or",
        ),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as error:
        list(read_rows([path]))
    assert str(error.value).startswith(path) and "\n" not in str(error.value)


def test_files_that_are_not_there_are_told_before_any_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", json.dumps({"text": "a"}))
    with pytest.raises(DataError, match="no such file or folder"):
        read_rows([path, str(tmp_path / "b.jsonl")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="in this folder"):
        read_rows([str(tmp_path / "empty")])


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes("\ufeffa\x0bb\r\n\nc\u2028d\re".encode())
    assert list(full_lines(path)) == [(1, "a\x0bb"), (3, "c\u2028d\re")]
