"""Text files of every compression and encoding, whole and damaged."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import pytest
import zstandard

from fedbert_ds.data.text_files import CHUNK_BYTES, COMPRESSIONS, Encodings, form_of, lines_of
from fedbert_ds.errors import DataError

TEXT = "Le malade a été admis à l'hôpital.\nIl était fiévreux, très pâle et déjà affaibli.\n"
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
MARKED = ("utf-8-sig", "utf-16", "utf-32")
"""Encodings that begin with a mark."""


def compressed(path: Path, content: bytes) -> Path:
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](content))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", *MARKED, "cp1252"])
@pytest.mark.parametrize("compression", COMPRESS)
def test_every_compression_and_encoding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], compression: str, encoding: str
) -> None:
    path = compressed(tmp_path / f"a.txt{compression}", (TEXT * 20).encode(encoding))
    assert "".join(lines_of(path)) == TEXT * 20
    told = capsys.readouterr().out
    assert ("not UTF-8, read as " in told) == (encoding == "cp1252"), told
    assert len(told.splitlines()) <= 1


def test_the_tests_know_every_compression() -> None:
    assert set(COMPRESS) - {""} == set(COMPRESSIONS)


@pytest.mark.parametrize("named", ["cp1252", "latin-1", "windows-1252"])
def test_a_named_encoding_is_taken_at_its_word(tmp_path: Path, named: str) -> None:
    path = compressed(tmp_path / "a.txt", "naïve".encode("latin-1"))
    assert list(lines_of(path, encodings=Encodings(named))) == ["naïve"]


def test_a_mark_counts_more_than_a_named_encoding(tmp_path: Path) -> None:
    path = compressed(tmp_path / "a.txt", TEXT.encode("utf-8-sig"))
    assert "".join(lines_of(path, encodings=Encodings("cp1252"))) == TEXT


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    "text", [TEXT, "Fever for three days.\n", "患者は熱があり 三日後に退院した\n", "Пациент выписан\n"]
)
def test_utf_16_without_its_mark_shows_and_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str, text: str
) -> None:
    """Of English it would pass for UTF-8, a zero behind every letter."""
    path = compressed(tmp_path / "a.txt", (text * 20).encode(encoding))
    assert "".join(lines_of(path)) == text * 20
    assert f"not UTF-8, read as {encoding}; name its encoding" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 100, b"so\0\0it\0goes\n" * 20, b"one \0 in a text" * 20])
def test_zeros_alone_are_no_utf_16(tmp_path: Path, content: bytes) -> None:
    path = compressed(tmp_path / "a.txt", content)
    assert "".join(lines_of(path)).encode() == content


def test_what_cannot_be_decoded_is_replaced_and_counted(tmp_path: Path) -> None:
    path = compressed(tmp_path / "a.txt", b"caf\x81 na\x8dve\n")
    encodings = Encodings("cp1252")
    assert list(lines_of(path, encodings=encodings)) == ["caf\ufffd na\ufffdve\n"]
    assert encodings.replaced == 2


@pytest.mark.parametrize(("content", "named"), [(b"caf\xe9", "utf-8"), (b"\xef\xbb\xbfcaf\xe9", None)])
def test_what_is_no_utf_8_though_it_is_said_to_be_is_counted(tmp_path: Path, content: bytes, named: str | None) -> None:
    """By its user, or by its mark. The sign for such bytes may also stand in valid text."""
    encodings = Encodings(named)
    assert list(lines_of(compressed(tmp_path / "a.txt", content), encodings=encodings)) == ["caf\ufffd"]
    assert encodings.replaced == 1
    plain = Encodings()
    assert list(lines_of(compressed(tmp_path / "b.txt", "caf\ufffd".encode()), encodings=plain)) == ["caf\ufffd"]
    assert plain.replaced == 0


def test_a_file_is_looked_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A client reads its text twice: to count it and to tokenize it."""
    path = compressed(tmp_path / "a.txt", (TEXT * 20).encode("cp1252"))
    encodings = Encodings()
    assert "".join(lines_of(path, encodings=encodings)) == "".join(lines_of(path, encodings=encodings)) == TEXT * 20
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("size", [CHUNK_BYTES - 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 1])
def test_the_first_foreign_byte_may_come_late(tmp_path: Path, size: int) -> None:
    """And a character may lie across two chunks."""
    plain = ("so it goes " * (size // 11 + 1))[:size]
    path = compressed(tmp_path / "a.txt", (plain + "é\n").encode())
    assert "".join(lines_of(path)) == plain + "é\n"
    path = compressed(tmp_path / "b.txt", (plain + "\n" + TEXT * 200).encode("cp1252"))
    assert "".join(lines_of(path)) == plain + "\n" + TEXT * 200


LANGUAGES = {
    "cp1252": (
        "Le malade a été admis à l\u2019hôpital, déjà très affaibli, où il fut opéré du cœur.",
        "Die Größe der Wunde wurde täglich überprüft; Übelkeit und Schmerzen ließen nach.",
        "El paciente ingresó en el hospital con fiebre alta; mañana será operado del corazón.",
        "O doente não tem tensão alta, mas são necessárias mais observações à noite.",
        "Patienten lå på sjukhus i två veckor och fick medicin för högt blodtryck. Sår på foten.",
    ),
    # Czech and Slovak pass for Western: each of their letters is one there. The warning tells.
    "cp1250": ("Pacjent został przyjęty do szpitala z gorączką i bólem głowy, źle się czuł.",),
    "cp1251": ("Больной был принят в больницу с высокой температурой и головной болью.",),
    "koi8_r": ("Больной был принят в больницу с высокой температурой и головной болью.",),
    "cp1253": ("Ο ασθενής εισήχθη στο νοσοκομείο με υψηλό πυρετό και πονοκέφαλο.",),
    "cp932": ("患者は高熱と頭痛で入院した。治療は三日間続いた。",),
    "gb18030": ("病人因高烧和头痛入院。治疗持续了三天。",),
}


@pytest.mark.parametrize(("encoding", "text"), [(name, text) for name, texts in LANGUAGES.items() for text in texts])
def test_what_hospitals_of_many_countries_export(tmp_path: Path, encoding: str, text: str) -> None:
    text = f"{text}\n" * 20
    assert "".join(lines_of(compressed(tmp_path / "a.csv", text.encode(encoding)))) == text


@pytest.mark.parametrize("encoding", ["cp850", "mac_roman"])
def test_an_encoding_that_does_not_show_is_asked_for(tmp_path: Path, encoding: str) -> None:
    text = LANGUAGES["cp1252"][1] * 20
    path = compressed(tmp_path / "a.txt", text.encode(encoding))
    with pytest.raises(DataError, match=r"neither UTF-8 nor of an encoding that shows; name it: data\.encoding"):
        list(lines_of(path))
    assert "".join(lines_of(path, encodings=Encodings(encoding))) == text


def test_several_frames_of_zstd_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"".join(zstandard.compress(line.encode()) for line in TEXT.splitlines(keepends=True) * 99))
    assert "".join(lines_of(path)) == TEXT * 99


def test_an_unknown_encoding_is_one_line(tmp_path: Path) -> None:
    path = compressed(tmp_path / "a.txt", b"so")
    with pytest.raises(DataError, match="encoding utf-9: there is none of that name"):
        list(lines_of(path, encodings=Encodings("utf-9")))


@pytest.mark.parametrize("compression", [suffix for suffix in COMPRESS if suffix])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "no archive"])
def test_a_damaged_archive_is_one_line(tmp_path: Path, compression: str, damage: str) -> None:
    path = compressed(tmp_path / f"a.txt{compression}", TEXT.encode() * 500)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "flipped":
        content[3:40] = bytes(byte ^ 255 for byte in content[3:40])
    else:
        content = bytearray(b"no archive at all")
    path.write_bytes(content)
    with pytest.raises(DataError) as told:
        list(lines_of(path))
    assert str(path) in str(told.value) and "\n" not in str(told.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(lines_of(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("name", "form"),
    [("a.JSONL.gz", ".jsonl"), ("a.csv", ".csv"), ("a.b.tsv.zst", ".tsv"), ("wiki_00", ""), ("wiki_00.bz2", "")],
)
def test_forms(name: str, form: str) -> None:
    assert form_of(Path(name)) == form
