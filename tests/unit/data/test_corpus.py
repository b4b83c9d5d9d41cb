"""Every kind of source gives its articles; a mistake in one is a line that says what to change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from unit.data.test_text_files import compressed

from fedbert_ds.data import corpus, python_docs
from fedbert_ds.data.corpus import Article, Reading, identity_of, parse_hub_name, read_articles
from fedbert_ds.data.shards import write_shard
from fedbert_ds.errors import DataError

WIKITEXT = """
 = First title =

 A paragraph with state @-@ of @-@ the @-@ art , 1 @,@ 200 words and 3 @.@ 5 more .

 = = A section = =

 Another = paragraph = .
 = Second title =

 Text two .
"""
WIKITEXT_ARTICLES = [
    Article(
        "First title",
        "A paragraph with state-of-the-art , 1,200 words and 3.5 more .\n= = A section = =\nAnother = paragraph = .",
    ),
    Article("Second title", "Text two ."),
]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_python_documentation_is_a_thousand_articles_in_a_stable_order() -> None:
    articles = list(read_articles(["python-docs"]))
    assert len(articles) > 900
    assert min(len(article.text) for article in articles) >= python_docs.SHORTEST_ARTICLE
    assert articles[0].title == "assert" and articles[0].text.startswith('The "assert" statement')
    assert "argparse.ArgumentParser" in {article.title for article in articles}
    assert list(read_articles(["python-docs"], max_articles=30)) == articles[:30]


def test_python_documentation_of_one_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = ("word " * 40).strip()
    function, method = 'def f():\n    "Function."\n', '    def m(self): "Method."\n'
    source = f'"""Module. {long}"""\n{function}class C:\n    """Class. {long}"""\n{method}'
    write(tmp_path / "one.py", source + "class Tiny:\n    'Too short.'\n")
    write(tmp_path / "broken.py", "def (:")
    (tmp_path / "test").mkdir()
    write(tmp_path / "test" / "ignored.py", source)
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(read_articles(["python-docs"])) == [
        Article("one", f"Module. {long}\n\nFunction."),
        Article("one.C", f"Class. {long}\n\nMethod."),
    ]


def test_text_file_is_one_document_between_blank_lines_each_and_one_in_a_folder(tmp_path: Path) -> None:
    """BERT's own format; who has a folder of notes has a note a file."""
    path = write(tmp_path / "note.txt", "\ufeffOne.\n\n \nTwo\nlines.\n")
    assert list(read_articles([path])) == [Article("note:1", "One."), Article("note:4", "Two\nlines.")]
    assert list(read_articles([str(tmp_path)])) == [Article("note", "One.\n\n \nTwo\nlines.")]


def test_a_document_larger_than_memory_is_divided_where_a_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of sentences without a blank line is one document, of any size."""
    monkeypatch.setattr(corpus, "LONGEST_DOCUMENT", 20)
    lines = [f"sentence {n}\n" for n in range(5)]
    path = write(tmp_path / "notes.txt", "".join(lines) + "\nshort\n")
    reading = Reading()
    assert list(read_articles([path], reading=reading)) == [
        Article("notes:1", "sentence 0\nsentence 1"),
        Article("notes:3", "sentence 2\nsentence 3"),
        Article("notes:5", "sentence 4"),
        Article("notes:7", "short"),
    ]
    assert reading.sentences() == ["documents of more than 20 characters were divided, in 2 places"]
    in_folder = Reading()
    assert [article.text for article in read_articles([str(tmp_path)], reading=in_folder)] == [
        "sentence 0\nsentence 1",
        "sentence 2\nsentence 3",
        "sentence 4\n\nshort",
    ]
    assert in_folder.divided == 2 and in_folder.files == 1


def test_what_says_that_text_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without reading it: path, size and time of each file, and how many are left out."""
    (tmp_path / "notes").mkdir()
    first = write(tmp_path / "notes" / "a.txt", "A")
    folder = str(tmp_path / "notes")
    known = identity_of([folder])
    assert known == identity_of([folder]) != identity_of([first])
    write(tmp_path / "notes" / "scan.docx", "x")
    assert identity_of([folder]) != known
    (tmp_path / "notes" / "scan.docx").unlink()
    write(tmp_path / "notes" / "b.txt", "B")
    assert identity_of([folder]) != known
    assert identity_of([folder, "python-docs"]) is None
    monkeypatch.setattr(corpus, "load_hub", lambda name, streaming: object())
    assert identity_of(["hub:of/nothing"]) is None
    rows = SimpleNamespace(cache_files=[{"filename": first}])
    monkeypatch.setattr(corpus, "load_hub", lambda name, streaming: rows)
    assert identity_of(["hub:owner/name:train"]) not in (None, identity_of(["hub:owner/name:test"]))
    with pytest.raises(DataError, match="no such file or folder"):
        identity_of([str(tmp_path / "nowhere")])


def test_jsonl_is_one_article_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "One."}\n\n{"text": "Two.", "title": "T"}\n{"text": "  "}\n')
    assert list(read_articles([path])) == [Article("a:1", "One."), Article("T", "Two.")]


def test_lone_surrogates_do_not_reach_the_tokenizer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "broken \\ud800 emoji"}')
    assert [article.text for article in read_articles([path])] == ["broken ? emoji"]


@pytest.mark.parametrize("name", ["wiki.train.tokens", "wiki.train.raw"])
def test_wikitext_is_split_at_titles(tmp_path: Path, name: str) -> None:
    assert list(read_articles([write(tmp_path / name, WIKITEXT)])) == WIKITEXT_ARTICLES


def test_folder_is_read_by_name_and_sources_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.txt", "B")
    write(tmp_path / "sub" / "c.TXT", "C")
    write(tmp_path / "ignored.md", "no")
    first = write(tmp_path / "a.txt", "A")
    texts = [article.text for article in read_articles([first, str(tmp_path)])]
    assert texts == ["A", "A", "B", "C"]
    assert [article.text for article in read_articles([first, str(tmp_path)], max_articles=3)] == ["A", "A", "B"]


def test_parquet_reads_the_text_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pyarrow.table({"text": ["One.", None, "Two."], "title": ["T", "U", None], "n": [1, 2, 3]}), path
    )
    assert list(read_articles([str(path)])) == [Article("T", "One."), Article("a:3", "Two.")]
    parquet.write_table(pyarrow.table({"text": WIKITEXT.splitlines(keepends=True)}), path)
    assert list(read_articles([str(path)])) == WIKITEXT_ARTICLES
    parquet.write_table(pyarrow.table({"body": ["One."], "n": [1]}), path)
    with pytest.raises(DataError, match=r"no column `text` \(columns: body, n\); name it in data\.text_column"):
        list(read_articles([str(path)]))
    assert list(read_articles([str(path)], reading=Reading("body"))) == [Article("a:1", "One.")]
    with pytest.raises(DataError, match=r"no column `note` \(data\.text_column\); there are body, n"):
        list(read_articles([str(path)], reading=Reading("note")))
    reading = Reading()
    parquet.write_table(pyarrow.table({"text": ["d\u00e9j\u00e0".encode(), b"caf\xe9", None], "n": [1, 2, 3]}), path)
    assert [article.text for article in read_articles([str(path)], reading=reading)] == ["d\u00e9j\u00e0", "caf\ufffd"]
    assert reading.sentences() == ["1 characters could not be decoded", "left out: 1 rows without text"]
    parquet.write_table(pyarrow.table({"text": [["One."], ["Two."]], "n": [1, 2]}), path)
    with pytest.raises(DataError, match=r"row a:1 holds list and no text; name another column: data\.text_column"):
        list(read_articles([str(path)]))
    write(path, "not parquet")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(read_articles([str(path)]))


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_reads_folders_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", '{"text": "One."}\n{"text": "Two."}\n')
    write(folder / "validation.jsonl", '{"text": "Three."}\n')
    read = lambda name: [article.text for article in read_articles([name], streaming=streaming)]  # noqa: E731
    assert read(f"hub:{folder}") == ["One.", "Two."]
    assert read(f"hub:{folder}:validation") == ["Three."]
    with pytest.raises(DataError, match=r"cannot load it: .* the form is hub:NAME"):
        read(f"hub:{folder}:test")
    other = tmp_path / "other"
    other.mkdir()
    write(other / "train.jsonl", '{"body": "One.", "n": 1}')
    with pytest.raises(DataError, match=r"no column `text` \(columns: body, n\)"):
        read(f"hub:{other}")


def test_hub_reads_data_sets_saved_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["One.", "Two."]})
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "splits")
    datasets.Dataset.from_dict({"body": ["One."], "n": [1]}).save_to_disk(tmp_path / "body")
    for name in (f"hub:{tmp_path}/rows", f"hub:{tmp_path}/splits:test"):
        assert list(read_articles([name])) == [
            Article(f"{name.split(':')[1].rsplit('/')[-1]}:1", "One."),
            Article(f"{name.split(':')[1].rsplit('/')[-1]}:2", "Two."),
        ]
    with pytest.raises(DataError, match="no column `text`"):
        list(read_articles([f"hub:{tmp_path}/body"]))


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("hub:owner/name", ("owner/name", None, "train")),
        ("hub:owner/name:validation", ("owner/name", None, "validation")),
        ("hub:owner/name:wikitext-103-raw-v1", ("owner/name", "wikitext-103-raw-v1", "train")),
        ("hub:owner/name:20231101.en:train[:1%]", ("owner/name", "20231101.en", "train[:1%]")),
        ("hub:name:test[10:20]", ("name", None, "test[10:20]")),
    ],
)
def test_hub_names(source: str, parts: tuple[str, str | None, str]) -> None:
    assert parse_hub_name(source) == parts


@pytest.mark.parametrize("package", ["datasets", "pyarrow"])
def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    source = "hub:owner/name" if package == "datasets" else write(tmp_path / "a.parquet", "")
    with pytest.raises(DataError, match=r"pip install fedbert-ds\[data\]"):
        list(read_articles([source]))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: str(folder / "none.txt"), "no such file or folder"),
        (
            lambda folder: write(folder / "a.docx", "x"),
            "cannot read .docx; use .txt, .tokens, .raw, .tsv, .csv",
        ),
        (lambda folder: str(folder), "no file of text in this folder (.txt, .tokens, .raw, .tsv, .csv"),
        (lambda folder: "hub:", "the form is hub:NAME"),
        (lambda folder: "hub:a:b:c:d", "the form is hub:NAME"),
        (lambda folder: write(folder / "a.txt", " \n"), "holds no text"),
        (lambda folder: write(folder / "a.jsonl", "{"), "line 1 is not JSON"),
        (lambda folder: write(folder / "a.jsonl", '{"text": "a"}\n[1]'), "line 2 is no JSON object"),
        (lambda folder: write(folder / "a.jsonl", '{"body": "a", "n": 1}'), "no column `text` (columns: body, n)"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, prepare: Callable[[Path], str], message: str) -> None:
    source = prepare(tmp_path)
    with pytest.raises(DataError) as caught:
        list(read_articles([source]))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names", [("TEXT", "id"), ("Text ", "id"), ("note",), ("text", "TEXT")], ids=lambda names: " ".join(names)
)
def test_the_column_of_text_is_the_one_that_looks_so(tmp_path: Path, names: tuple[str, ...]) -> None:
    rows = ",".join(names) + "\n" + ",".join(["One."] + ["x"] * (len(names) - 1)) + "\n"
    assert [article.text for article in read_articles([write(tmp_path / "a.csv", rows)])] == ["One."]


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": null}\n{"text": "One."}\n{"text": " "}\n')
    reading = Reading()
    assert [article.text for article in read_articles([path], reading=reading)] == ["One."]
    assert reading.sentences() == ["left out: 2 rows without text"]
    assert (reading.articles, reading.characters, reading.longest_word) == (1, 4, 4)


def test_what_a_folder_holds_besides_is_told(tmp_path: Path) -> None:
    for name in ("a.txt", "b.TXT", "._a.txt", ".hidden/c.txt", "__MACOSX/d.txt", ".ipynb_checkpoints/a-checkpoint.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "One.")
    write(tmp_path / "report.docx", "x")
    write(tmp_path / "info.json", "{}")
    write(tmp_path / "README", "x")
    reading = Reading()
    assert len(list(read_articles([str(tmp_path)], reading=reading))) == 2
    assert reading.sentences() == ["left out: 1 file (.docx), 1 file (.json), 1 file (no suffix), 4 files (hidden)"]


def test_a_column_that_nobody_named_is_told(tmp_path: Path) -> None:
    """Its name may be a first text, of a file without a header."""
    first = "Fever for three days, then a cough that would not end."
    for name, head in (("a.csv", "note"), ("b.csv", f'"{first}"'), ("c.csv", "text")):
        write(tmp_path / name, f"{head}\nOne.\nTwo.\n")
    reading = Reading()
    assert len(list(read_articles([str(tmp_path)], reading=reading))) == 6
    assert reading.sentences() == [
        f"the text is in a table's only column, which the first line calls `note`, `{first[:40]}`"
    ]
    many = Reading()
    rows = "\n".join(f'{{"key {n}": "text"}}' for n in range(99))
    assert len(list(read_articles([write(tmp_path / "many.jsonl", rows)], reading=many))) == 99
    assert "`key 0`, `key 1`, `key 2`" in many.sentences()[0] and "key 3" not in many.sentences()[0]
    named = Reading("note")
    list(read_articles([str(tmp_path / "a.csv")], reading=named))
    assert named.sentences() == []


def test_one_very_long_word_is_told(tmp_path: Path) -> None:
    reading = Reading()
    list(read_articles([write(tmp_path / "a.txt", f"so {'x' * 2000}")], reading=reading))
    assert reading.sentences() == ["the longest word has 2,000 characters"]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_what_wikiextractor_writes(tmp_path: Path, compression: str) -> None:
    (tmp_path / "AA").mkdir()
    lines = '{"title": "T", "text": "One."}\n{"title": "U", "text": ""}\n'
    document = '<doc id="1" url="u" title="V">\nV\n\nTwo.\n\n</doc>\n<doc id="2" url="u">\nThree.\n</doc>\n'
    for name, text in (("wiki_00", lines), ("wiki_01", document)):
        compressed(tmp_path / "AA" / f"{name}{compression}", text.encode())
    assert list(read_articles([str(tmp_path)])) == [
        Article("T", "One."),
        Article("V", "V\n\nTwo."),
        Article(f"wiki_01{compression}", "Three."),
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_no_file_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe\.txt: is no file, and text is read twice; save it in one"):
        read_articles([str(tmp_path / "pipe.txt")])


def test_a_missing_file_is_found_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_articles(["python-docs", str(tmp_path / "none.txt")])


def test_shard_files_are_sources_too(tmp_path: Path) -> None:
    articles = [Article("Ä title", "Line one.\nLine two. \u2028 naïve"), Article("", "Untitled.")]
    write_shard(tmp_path / "clients" / "0.jsonl", articles)
    named = [articles[0], Article("0:2", "Untitled.")]
    assert list(read_articles([str(tmp_path / "clients" / "0.jsonl")])) == named
    assert list(read_articles([str(tmp_path / "clients")])) == named
    assert (
        json.loads((tmp_path / "clients" / "0.jsonl").read_text(encoding="utf-8").split("\n")[1])["text"] == "Untitled."
    )


def test_importing_the_data_modules_loads_nothing_heavy() -> None:
    command = (
        "import sys, fedbert_ds.data.corpus, fedbert_ds.data.shards, fedbert_ds.data.tokenizer; "
        "assert 'torch' not in sys.modules, 'torch'; import fedbert_ds.data.masking; "
        "heavy = {'transformers', 'datasets', 'tokenizers', 'pyarrow'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", command], check=True, timeout=60)


def test_a_binary_column_is_text(tmp_path: Path) -> None:
    """As writers without the mark of UTF-8 leave it in Parquet; nulls are left out."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array(["Fieber über Nacht.".encode(), None], pyarrow.binary())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert [article.text for article in read_articles([str(tmp_path / "a.parquet")])] == ["Fieber über Nacht."]
