"""Text of packages: dictionaries by their index, pages without markup; packages that fail."""

from __future__ import annotations

import gzip
import json
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.domains import __main__ as program
from benchmarks.domains.html_text import text_of_html
from benchmarks.domains.packages import DOMAINS, ENTRIES_PER_PAGE, Domain, dictionary, pages, sources


def test_a_page_keeps_its_prose_alone() -> None:
    page = """<html><head><title>no</title><style>p {}</style></head><body><nav>menu</nav>
    <h1>Heads</h1><p>One  &amp;\n two<br>three <b>bold</b></p><script>code()</script><ul><li>last</ul></body></html>"""
    assert text_of_html(page) == "Heads\nOne &\ntwo\nthree bold\nlast"
    assert text_of_html("") == text_of_html("<p>") == ""


def base64_of(number: int) -> str:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return (base64_of(number // 64) if number >= 64 else "") + digits[number % 64]


def test_a_dictionary_is_read_by_its_index(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/dictd"
    folder.mkdir(parents=True)
    entries = [f"entry {number} é" for number in range(ENTRIES_PER_PAGE + 3)]
    licence, data, lines = b"licence", b"", ["00-database-info\tA\tH"]
    data += licence
    for number, entry in enumerate(entries):
        lines.append(f"word {number}\t{base64_of(len(data))}\t{base64_of(len(entry.encode()))}")
        data += entry.encode()
    lines.append(lines[1].replace("word 0", "another word for it"))
    (folder / "tiny.dict.dz").write_bytes(gzip.compress(data))
    (folder / "tiny.index").write_text("\n".join(sorted(lines)) + "\n", "utf-8")
    first, second = dictionary("tiny", tmp_path)
    assert first == ("page 1", "\n\n".join(entries[:ENTRIES_PER_PAGE]))
    assert second == ("page 2", "\n\n".join(entries[ENTRIES_PER_PAGE:]))


def test_pages_and_sources_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.html").write_text(f"<p>{name}", "utf-8")
        (tmp_path / f"{name}.rst.txt").write_text(f"{name}\n", "utf-8")
    assert list(pages(".", "*.html", tmp_path)) == [("a", "a"), ("b", "b")]
    assert list(sources(".", "*.rst.txt", tmp_path)) == [("a", "a\n"), ("b", "b\n")]


def test_the_program_writes_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack(package: str, folder: Path) -> str:
        assert package == "words"
        (folder / "long.rst.txt").write_text("word " * 100, "utf-8")
        (folder / "short.rst.txt").write_text("word", "utf-8")
        return "words_1.deb"

    monkeypatch.setattr(program, "unpack", unpack)
    monkeypatch.setitem(DOMAINS, "sqlite", Domain("words", partial(sources, ".", "*.rst.txt")))
    program.main(["--out", str(tmp_path / "out"), "--domains", "sqlite"])
    (line,) = (tmp_path / "out/sqlite.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line) == {"title": "long", "text": "word " * 100}


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        (FileNotFoundError("apt-get"), "apt-get is not on this machine"),
        (SimpleNamespace(returncode=100, stderr="E: Unable to locate package sqlite3-doc\n", stdout=""), "Unable to"),
        (SimpleNamespace(returncode=100, stderr="", stdout=""), "no message"),
    ],
)
def test_a_package_that_cannot_be_had_is_one_line(
    outcome: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: Any, **__: Any) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit):
        program.main(["--out", str(tmp_path), "--domains", "sqlite"])
    printed = capsys.readouterr().err
    assert says in printed and printed.count("\n") == 1
