"""Every row of the table in docs/text.md: formats, compressions and encodings that are read."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from unit.data.test_text_files import COMPRESS

from fedbert_ds.data.corpus import FORMS, read_articles

PAGE = Path(__file__).parents[3] / "docs" / "text.md"
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252")
TEXTS = [
    "Le malade a été admis à l'hôpital, fiévreux et très pâle. " * 3 + "Fin.",
    "Il était déjà affaibli ; on l'a opéré du cœur. " * 3 + "Fin.",
]


def separated(separator: str, quoted: bool) -> str:
    if not quoted:
        return "\n".join(["n\ttext", *(f"{n}\t{text}" for n, text in enumerate(TEXTS))])
    out = io.StringIO()
    csv.writer(out, delimiter=separator).writerows([["n", "text"], *enumerate(TEXTS)])
    return out.getvalue()


def json_lines() -> str:
    return "\n".join(json.dumps({"text": text, "n": n}, ensure_ascii=False) for n, text in enumerate(TEXTS))


def wikitext() -> str:
    return "".join(f" = Title {n} =\n\n {text}\n" for n, text in enumerate(TEXTS))


CONTENT: dict[str, Callable[[], str]] = {
    ".txt": lambda: "\n\n".join(TEXTS),
    ".csv": lambda: separated(",", quoted=True),
    ".tsv": lambda: separated("\t", quoted=False),
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": lambda: json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False, indent=1),
    ".tokens": wikitext,
    ".raw": wikitext,
    "wiki_00": lambda: "".join(f'<doc id="{n}" title="T">\n{text}\n</doc>\n' for n, text in enumerate(TEXTS)),
}


def by_pyarrow(suffix: str) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    table, out = pyarrow.table({"text": TEXTS, "n": [1, 2]}), io.BytesIO()
    if suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, out)
    else:
        with pyarrow.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
    return out.getvalue()


def rows() -> dict[str, list[str]]:
    """The table's rows by suffix."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.count(" | ") == 3]
    return {row[0].strip("`"): row for row in cells if re.match(r"`(\.|wiki)", row[0])}


@pytest.mark.parametrize("suffix", rows())
def test_what_the_page_says_is_read(tmp_path: Path, suffix: str) -> None:
    _, _, is_compressed, encodings = rows()[suffix]
    assert is_compressed == "yes" and encodings in ("all", "its own")
    name = suffix if suffix == "wiki_00" else f"a{suffix}"
    for compression, compress in COMPRESS.items():
        for encoding in ENCODINGS if encodings == "all" else ("its-own",):
            content = CONTENT[suffix]().encode(encoding) if encodings == "all" else by_pyarrow(suffix)
            folder = tmp_path / f"{compression or 'plain'}-{encoding}"
            folder.mkdir()
            path = folder / f"{name}{compression}"
            path.write_bytes(compress(content))
            assert [article.text.strip() for article in read_articles([str(path)])] == TEXTS, path


def test_the_page_has_every_format_and_separator(tmp_path: Path) -> None:
    assert set(rows()) == {*FORMS.split(", "), "wiki_00"}
    for number, separator in enumerate(",;\t|"):
        path = tmp_path / f"{number}.csv"
        path.write_text(separated(separator, quoted=True), encoding="utf-8")
        assert [article.text for article in read_articles([str(path)])] == TEXTS
