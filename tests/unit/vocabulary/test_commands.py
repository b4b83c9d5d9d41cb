"""`fedbert-ds vocab` from text to a tokenizer, in one round and in two; a mistake is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedbert_ds.cli import main
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.tokenizer import load_tokenizer, train_wordpiece
from fedbert_ds.vocabulary.commands import REPORT

COMMON = "the patient was seen again and the treatment of the patient goes on with care. "
TEXT = {"ada": COMMON * 3 + "cardiac murmur 2024 ", "bo": COMMON * 2 + "fractured femur ", "cy": COMMON + "lymphoma "}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three owners' text, counted, and their key; it is the working folder."""
    monkeypatch.chdir(tmp_path)
    for owner, text in TEXT.items():
        (tmp_path / f"{owner}.txt").write_text(text)
        main(["vocab", "count", "--data", f"{owner}.txt", "--id", owner, "--out", f"{owner}.json"])
    (tmp_path / "key").write_text("k" * 64)
    return tmp_path


def files(suffix: str = "") -> list[str]:
    return [f"{owner}{suffix}.json" for owner in TEXT]


def test_all_counts_make_the_pooled_texts_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["vocab", "merge", *files(), "--least", "1", "--size", "120", "--out", "vocabulary"])
    expected = train_wordpiece([Article("", text) for text in TEXT.values()], 120)
    found = load_tokenizer(str(folder / "vocabulary"))
    assert found.get_vocab() == expected.get_vocab()
    assert found("The patient's MURMUR").input_ids == expected("The patient's MURMUR").input_ids


def test_two_rounds_keep_other_words_at_home(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["vocab", "merge", *files(), "--least", "2", "--size", "120", "--out", "plain"])
    for owner in TEXT:
        main(["vocab", "digest", "--counts", f"{owner}.json", "--key", "key", "--out", f"{owner}-digests.json"])
    main(["vocab", "common", *files("-digests"), "--least", "2", "--out", "common.json"])
    for owner in TEXT:
        left = ["--counts", f"{owner}.json", "--common", "common.json", "--key", "key"]
        main(["vocab", "select", *left, "--out", f"{owner}-selected.json"])
    capsys.readouterr()
    main(["vocab", "merge", *files("-selected"), "--least", "2", "--size", "120", "--out", "private"])
    assert load_tokenizer("private").get_vocab() == load_tokenizer("plain").get_vocab()
    private = ("cardiac", "murmur", "2024", "fractured", "femur", "lymphoma")
    for path in folder.glob("*-*.json"):
        assert not any(word in path.read_text() for word in private), path
    printed = capsys.readouterr().out
    assert "| ada | common ones | 13 | 13 | 0 |" in printed and (folder / "private" / REPORT).read_text() in printed
    assert "| ada | all counted | 16 | 13 | 3 |" in (folder / "plain" / REPORT).read_text()


def test_counting_says_what_it_reveals_and_can_reveal_less(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    restricted = ["--minimum-count", "2", "--top", "5", "--no-digits"]
    main(["vocab", "count", "--data", "ada.txt", "--id", "ada", "--out", "less.json", *restricted])
    printed = capsys.readouterr().out
    assert "counted 5 of 16 words" in printed and "learns these words" in printed and "0 occur once, 0 have" in printed
    words = json.loads((folder / "less.json").read_text())["words"]
    assert len(words) == 5 and words["the"] == 9
    main(["vocab", "count", "--data", "ada.txt", "--id", "ada", "--out", "all.json"])
    assert "3 occur once, 1 have digits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["count", "--data", "none.txt", "--out", "x.json"], "none.txt"),
        (["count", "--data", "ada.txt", "--out", "x.json", "--minimum-count", "0"], "--minimum-count and --top"),
        (["count", "--data", "ada.txt", "--out", "x.json", "--top", "-1"], "--minimum-count and --top"),
        (["count", "--data", "ada.txt", "--out", "x.json", "--minimum-count", "99"], "no word is left to count"),
        (["count", "--data", "ada.txt", "--out", "x.json", "--id", " "], "--id is empty"),
        (["digest", "--counts", "none.json", "--key", "key", "--out", "x.json"], "none.json: no such file"),
        (["digest", "--counts", "ada.json", "--key", "none", "--out", "x.json"], "--key none: cannot be read"),
        (["common", "ada.json", "bo.json", "--least", "2", "--out", "x.json"], "not fedbert-ds word digests 1"),
        (["select", "--counts", "ada.json", "--common", "ada.json", "--key", "key", "--out", "x.json"], "not fedbert"),
        (["select", "--counts", "ada.json", "--common", "empty.json", "--key", "key", "--out", "x.json"], "same --key"),
        (["merge", "ada.json", "bo.json", "--least", "3", "--out", "x"], "--least 3: counts of 2 owners are here"),
        (["merge", "ada.json", "ada.json", "--least", "2", "--out", "x"], "two files are of ada"),
        (["merge", "ada.json", "bo.json", "--least", "2", "--size", "63", "--out", "x"], "--size 63 is too small"),
        (["merge", "ada.json", "bo.json", "--least", "2", "--out", "."], "exists; give --out a new folder"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    (folder / "empty.json").write_text('{"format": "fedbert-ds common digests 1", "least": 2, "digests": []}')
    before = sorted(folder.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["vocab", *arguments])
    error = capsys.readouterr().err
    assert exit_.value.code and says in error and error.count("\n") == 1 and "Traceback" not in error
    assert sorted(folder.iterdir()) == before
