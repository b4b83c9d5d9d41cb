"""`fedbert-ds certs`: what each step prints and leaves, and what it says without its package."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from fedbert_ds.cli import main


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def certs(*arguments: str) -> None:
    main(["certs", *arguments])


def test_from_the_authority_to_a_revoked_client(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certs("ca", "--name", "our authority")
    certs("server", "body.example", "gpu01", "10.0.0.7")
    certs("aggregator", "sums.example", "--days", "90")
    certs("client", "hospital-a")
    certs("request", "hospital-b", "--dir", "own")
    certs("sign", "own/hospital-b.csr")
    certs("renew", "hospital-a", "body.example")
    certs("revoke", "hospital-a")
    capsys.readouterr()
    certs("list")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    told = [(row[0].strip("| "), row[1], row[3]) for row in rows[2:]]
    assert told == [
        ("our authority", "authority", "3649 days left"),
        ("body.example", "server", "364 days left, replaced"),
        ("body.example", "server", "364 days left"),
        ("hospital-a", "client", "revoked"),
        ("hospital-a", "client", "revoked"),
        ("hospital-b", "client", "364 days left"),
        ("sums.example", "server", "89 days left"),
    ]
    assert rows[3][-1].strip(" |") == "body.example gpu01 10.0.0.7 localhost 127.0.0.1 ::1"
    made = {path.name for path in (tmp_path / "certs").iterdir()}
    assert made >= {"ca.pem", "ca.key", "body.example.pem", "body.example.key", "hospital-b.pem", "revoked.txt"}
    assert "hospital-b.key" not in made


@pytest.mark.parametrize("days", ["0", "-3", "100000"])
def test_days_that_cannot_be_are_one_line(days: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        certs("ca", "--days", days)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"fedbert-ds: --days {days}: a number from 1 to 36500\n"


@pytest.mark.parametrize("step", [("ca",), ("client", "ada"), ("request", "ada"), ("list",)])
def test_without_its_package_it_is_one_line(
    step: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "cryptography":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit) as ended:
        certs(*step)
    assert ended.value.code == 2
    assert "needs the package cryptography; install fedbert-ds[certs]" in capsys.readouterr().err
