"""Files of TLS, fine and damaged: expired, foreign, of another name, revoked, readable by all."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from fedbert_ds.certificates.authority import Authority
from fedbert_ds.doctor.certificates import certificate_findings
from fedbert_ds.doctor.finding import Finding
from fedbert_ds.wire.tls import TlsFiles

NOW = dt.datetime.now(dt.timezone.utc)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    past = Authority(folder, NOW - dt.timedelta(days=100))
    past.create("an authority", 3000)
    past.issue("old", 9, hosts=["body.example"])
    Authority(folder).issue("body", 300, hosts=["body.example"])
    Authority(folder).issue("soon", 20)
    gone = Authority(folder)
    gone.issue("gone", 300)
    gone.revoke("gone")
    other = Authority(folder / "other")
    other.create("another authority", 3000)
    other.issue("stranger", 300)
    return folder


def files(folder: Path, name: str, ca: Path | None = None) -> TlsFiles:
    return TlsFiles(ca or folder / "ca.pem", folder / f"{name}.pem", folder / f"{name}.key")


def faults(findings: list[Finding]) -> list[str]:
    return [finding.line for finding in findings if finding.is_in_the_way]


def test_what_fits_is_told_with_its_name_and_its_end(folder: Path) -> None:
    findings = list(certificate_findings(files(folder, "body"), ["body.example"], folder / "revoked.txt"))
    assert {finding.level for finding in findings} == {"ok"}
    assert "is body's, until 20" in findings[0].says or "is body.example's, until 20" in findings[0].says


def test_an_expired_certificate(folder: Path) -> None:
    (line,) = faults(list(certificate_findings(files(folder, "old"))))
    assert "has expired on" in line and "renew it (fedbert-ds certs renew)" in line


def test_one_that_ends_soon_is_a_warning(folder: Path) -> None:
    findings = list(certificate_findings(files(folder, "soon")))
    assert findings[0].level == "warn" and "expires in" in findings[0].says and not faults(findings)


def test_a_foreign_authority(folder: Path) -> None:
    (line,) = faults(list(certificate_findings(files(folder / "other", "stranger", folder / "ca.pem"))))
    assert "has not signed" in line


def test_a_key_of_another_certificate_and_files_that_are_none(folder: Path, tmp_path: Path) -> None:
    mixed = TlsFiles(folder / "ca.pem", folder / "body.pem", folder / "gone.key")
    assert "check the TLS files" in faults(list(certificate_findings(mixed)))[0]
    assert "cannot be read" in faults(list(certificate_findings(files(tmp_path, "no"))))[0]


def test_another_name_than_clients_dial(folder: Path) -> None:
    (line,) = faults(list(certificate_findings(files(folder, "body"), ["body.example", "gpu.example"])))
    assert "is not for gpu.example, which clients dial" in line


def test_a_revoked_certificate_and_a_list_that_is_gone(folder: Path, tmp_path: Path) -> None:
    (line,) = faults(list(certificate_findings(files(folder, "gone"), revoked=folder / "revoked.txt")))
    assert "gone.pem is on" in line
    (line,) = faults(list(certificate_findings(files(folder, "body"), revoked=tmp_path / "revoked.txt")))
    assert "revocation list cannot be read" in line


def test_an_authority_that_has_expired(tmp_path: Path) -> None:
    past = Authority(tmp_path, NOW - dt.timedelta(days=100))
    past.create("an authority", 3000)
    Authority(tmp_path).issue("body", 300)
    past.renew("ca", 50)
    lines = faults(list(certificate_findings(files(tmp_path, "body"))))
    assert any("ca.pem has expired on" in line and "certs renew ca" in line for line in lines)


def test_a_key_that_others_can_read(folder: Path, tmp_path: Path) -> None:
    key = tmp_path / "body.key"
    key.write_bytes((folder / "body.key").read_bytes())
    key.chmod(0o644)
    findings = list(certificate_findings(TlsFiles(folder / "ca.pem", folder / "body.pem", key)))
    assert [finding.line for finding in findings if finding.level == "warn"] == [
        f"warn  key: {key} can be read by others on this machine; chmod 600 {key}"
    ]
