"""Paths as users write them, with `~` and `$NAME`."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbert_ds.user_path import expanded, user_path


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~/runs", "/home/ada/runs"),
        ("~", "/home/ada"),
        ("$WARD/a.csv", "/mnt/ward/a.csv"),
        ("${WARD}s/a.csv", "/mnt/wards/a.csv"),
        ("$NOBODY/a.csv", "$NOBODY/a.csv"),
        ("a~b", "a~b"),
        ("hub:wikitext:wikitext-103-v1", "hub:wikitext:wikitext-103-v1"),
        ("notes of may.txt", "notes of may.txt"),
    ],
)
def test_what_a_shell_would_put_there(written: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("WARD", "/mnt/ward")
    monkeypatch.delenv("NOBODY", raising=False)
    assert expanded(written) == meant and user_path(written) == Path(meant)
