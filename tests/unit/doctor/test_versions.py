"""Versions against ranges: what is missing, too old, or only for another role."""

from __future__ import annotations

from fedbert_ds.doctor.versions import package_findings, python_finding, version_findings

REQUIREMENTS = ["torch>=2.6", "grpcio>=1.80", "deepspeed>=0.19; extra == 'server'", "ruff>=1; extra == 'dev'"]
THERE = {"torch": "2.6.0+cpu", "grpcio": "1.80.1", "deepspeed": "0.19.8"}


def lines(installed: dict[str, str], extra: str = "") -> list[str]:
    return [finding.line for finding in package_findings(REQUIREMENTS, installed.get, extra)]


def test_what_fits_is_one_line() -> None:
    assert lines(THERE) == ["ok    packages: torch 2.6.0+cpu, grpcio 1.80.1"]
    assert lines(THERE, "server") == ["ok    packages: torch 2.6.0+cpu, grpcio 1.80.1, deepspeed 0.19.8"]


def test_what_is_missing_or_too_old_is_named_with_what_to_install() -> None:
    (old,) = lines(THERE | {"grpcio": "1.78.0"})
    assert old == "fail  grpcio: 1.78.0 is not >=1.80; pip install fedbert-ds, or 'grpcio>=1.80'"
    (gone,) = lines({name: version for name, version in THERE.items() if name != "deepspeed"}, "server")
    assert gone.startswith("fail  deepspeed: is missing; pip install 'fedbert-ds[server]'")
    assert lines({"torch": "2.6.0", "grpcio": "1.80.1"})[0].startswith("ok"), "a client needs no deepspeed"


def test_python_itself() -> None:
    assert python_finding("3.11.7", "<3.14,>=3.10").level == "ok"
    assert python_finding("3.9.2", "<3.14,>=3.10").is_in_the_way
    assert python_finding("3.14.0", "<3.14,>=3.10").is_in_the_way


def test_this_installation_is_fine() -> None:
    """Or its tests would not run."""
    assert [finding.level for finding in version_findings("server")] == ["ok", "ok"]
