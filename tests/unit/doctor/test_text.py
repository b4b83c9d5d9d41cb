"""Text as an owner brings it, and a tokenizer that reads all, little or nothing of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbert_ds.data.corpus import Article, Reading
from fedbert_ds.data.tokenizer import train_wordpiece
from fedbert_ds.doctor import text
from fedbert_ds.doctor.text import sampled, tokenizer_finding, unknown_findings

ENGLISH = [Article("one", "the quick brown fox jumps over the lazy dog " * 20)]


def test_text_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("the quick brown fox\n\nthe lazy dog\n")
    findings, articles = sampled([str(tmp_path / "notes.txt")], Reading())
    assert [article.text for article in articles] == ["the quick brown fox", "the lazy dog"]
    assert findings[0].line == "ok    text: 2 articles, 31 characters"
    assert findings[-1].line == "ok    longest word: 5 characters"


def test_only_a_beginning_is_read_and_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "SAMPLE_CHARACTERS", 10)
    (tmp_path / "notes.txt").write_text("\n\n".join(["word word"] * 9))
    findings, articles = sampled([str(tmp_path / "notes.txt")], Reading())
    assert len(articles) == 2 and "the rest was not read" in findings[0].says


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("notes.txt", bytes(range(256)) * 40, "encoding"),
        ("notes.pdf", b"%PDF-1.7", ".pdf"),
        ("notes.csv", b"a,b\n1,2\n", "no column `text`"),
        ("notes.txt.gz", b"no gzip at all", "cannot be decompressed"),
        ("empty.txt", b"\n\n", "no text"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    (finding,), articles = sampled([str(tmp_path / name)], Reading())
    assert finding.is_in_the_way and says in finding.line and articles == []


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    (finding,), _ = sampled([str(tmp_path / "nowhere")], Reading())
    assert finding.is_in_the_way and "no such file or folder" in finding.line


def test_what_was_left_out_and_long_words_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " + "x" * 2000)
    (tmp_path / "b.pdf").write_text("none")
    findings, _ = sampled([str(tmp_path)], Reading())
    told = [finding.says for finding in findings if finding.level == "warn"]
    assert any("longest word has 2,000" in says for says in told) and any(".pdf" in says for says in told)


def test_a_tokenizer_that_is_there_and_one_that_is_not(tmp_path: Path) -> None:
    train_wordpiece(ENGLISH, 100).save_pretrained(tmp_path / "tokenizer")
    finding, tokenizer = tokenizer_finding(str(tmp_path / "tokenizer"))
    assert finding.level == "ok" and tokenizer is not None
    finding, tokenizer = tokenizer_finding(str(tmp_path / "nowhere"))
    assert finding.is_in_the_way and tokenizer is None


@pytest.mark.parametrize(
    ("written", "level"),
    [("the lazy dog " * 9, "ok"), ("the lazy dog 犬 " * 9, "warn"), ("これ は 犬 です", "fail")],
)
def test_what_the_tokenizer_does_not_know(written: str, level: str) -> None:
    tokenizer = train_wordpiece(ENGLISH, 100)
    (finding,) = unknown_findings([Article("one", written)], tokenizer)
    assert finding.level == level and finding.about == "[UNK]" and "% of" in finding.says
