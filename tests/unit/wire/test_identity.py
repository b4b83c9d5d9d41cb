"""Names, the name in a certificate, and a revocation list that changes under a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedbert_ds.errors import WireError
from fedbert_ds.wire.identity import (
    LONGEST_NAME,
    RevocationList,
    certificate_name,
    fingerprint_of_peer,
    is_name,
    name_of_peer,
)


@pytest.mark.parametrize("name", ["a", "hospital-a", "client-00", "ada@ward.example", "a" * LONGEST_NAME])
def test_names(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize(
    "name", ["", "-a", ".", "a b", "a/b", "a\n", "a\x1b[2J", "\trank 0", "é", "a\u202eb", "a" * (LONGEST_NAME + 1)]
)
def test_what_is_no_name(name: str) -> None:
    assert not is_name(name)


@pytest.mark.parametrize(
    ("common", "alternatives", "name"),
    [
        ("ada", ["ada"], "ada"),
        ("ada", ["localhost", "ada", "127.0.0.1"], "ada"),
        ("Ada's certificate", ["ada", "bo"], "ada"),
        ("ada", [], "ada"),
        ("", ["ada"], "ada"),
        ("", [], ""),
    ],
)
def test_a_certificate_has_one_name(common: str, alternatives: list[str], name: str) -> None:
    assert certificate_name(common, alternatives) == name
    facts = {"x509_common_name": [common.encode()]} if common else {}
    if alternatives:
        facts["x509_subject_alternative_name"] = [one.encode() for one in alternatives]
    assert name_of_peer(facts) == name


def test_a_peer_without_a_certificate_has_no_fingerprint() -> None:
    assert fingerprint_of_peer({}) == ""


def test_a_list_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "revoked.txt"
    path.write_text("# a head\n\n" + "a" * 64 + " ada 2026-01-01\n")
    revoked = RevocationList(path)
    assert revoked.holds("a" * 64) and not revoked.holds("b" * 64)
    assert not revoked.read(), "it has not changed"
    path.write_text(path.read_text() + "B" * 64 + "\n")
    assert revoked.read() and revoked.holds("b" * 64)
    path.write_text("# nobody\n")
    os.utime(path, ns=(1, 1))
    assert not revoked.holds("a" * 64)


def test_a_list_that_is_gone_or_is_none_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "revoked.txt"
    with pytest.raises(WireError, match=r"revoked.txt: the revocation list cannot be read; check tls\.revoked"):
        RevocationList(path).holds("a" * 64)
    path.write_text("hospital-a\n")
    with pytest.raises(WireError, match=r"revoked.txt: no line of a revocation list: hospital-a"):
        RevocationList(path).holds("a" * 64)
