"""A certificate authority in a folder: it signs, renews and revokes the parties' certificates.

Everything is PEM, keys are ECDSA P-256: gRPC's TLS takes no Ed25519. The private keys are not
encrypted; the folder and every key are their owner's alone.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedbert_ds.atomic_write import atomic_write, write_text
from fedbert_ds.errors import ConfigError
from fedbert_ds.folder_lock import private, private_folder
from fedbert_ds.wire.identity import LONGEST_NAME, certificate_name, fingerprint, is_name

AUTHORITY = "ca"
"""Name of the authority's own files: ca.pem, ca.key."""
ISSUED = "issued"
"""Folder with every certificate that was signed, by serial number: what can be revoked."""
REVOKED = "revoked.txt"
"""The revocation list, which run files name as `server.tls.revoked`."""

CLOCK_SKEW = dt.timedelta(hours=1)
"""A certificate counts from so long before it was made: clocks of other machines go wrong."""

CLIENT_USES = (ExtendedKeyUsageOID.CLIENT_AUTH,)
SERVER_USES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
"""Ranks listen, and dial an aggregator of another party."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Also names of every server: its own clients and its user dial them."""

_HOST = re.compile(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*")


@dataclass(frozen=True)
class Issued:
    """What one certificate says."""

    name: str
    kind: str
    """`authority`, `server` or `client`; an aggregator's is a server's."""
    hosts: tuple[str, ...]
    """A server's names and addresses."""
    expires: dt.datetime
    fingerprint: str
    is_revoked: bool = False
    is_current: bool = True
    """Not replaced by a later one of its name."""


class Authority:
    """The authority of one folder. `today` is the present time, in UTC; tests set another."""

    def __init__(self, folder: Path, today: dt.datetime | None = None) -> None:
        self.folder = folder
        self._today = today or dt.datetime.now(dt.timezone.utc)

    def create(self, name: str, days: int) -> Path:
        """Make the authority's key and certificate. ConfigError if the folder has one."""
        if self._certificate_file(AUTHORITY).exists() or self._key_file(AUTHORITY).exists():
            raise ConfigError(f"{self.folder}: has an authority already; renew it, or set another --dir")
        private_folder(self.folder)
        os.chmod(self.folder, 0o700)
        key = self._new_key(AUTHORITY)
        self._write_list([])
        return self._sign_itself(key, name, days)

    def issue(self, name: str, days: int, hosts: Sequence[str] | None = None) -> Path:
        """Make a key and a certificate of this name: a client's, or with `hosts` a server's.

        Returns the certificate's file; the key lies beside it. ConfigError for a name that cannot
        be one, or that has a certificate that counts.
        """
        self._check_free(name, hosts)
        names, uses = self._subject(name, hosts)
        key = self._new_key(name)
        return self._sign(name, key.public_key(), names, uses, days)

    def sign_request(self, file: Path, days: int) -> Path:
        """Sign a client's request (`request`): its key stays where it was made. ConfigError for one
        that does not hold, or whose name has a certificate that counts.
        """
        try:
            request = x509.load_pem_x509_csr(file.read_bytes())
            is_sound = request.is_signature_valid
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"{file}: no certificate request in PEM; make one with certs request") from error
        key = request.public_key()
        if not is_sound or not isinstance(key, ec.EllipticCurvePublicKey):
            raise ConfigError(f"{file}: the request does not hold, or its key is not ECDSA; make it anew")
        name = _common_name(request.subject)
        self._check_free(name, None)
        names, uses = self._subject(name, None)
        return self._sign(name, key, names, uses, days)

    def renew(self, name: str, days: int) -> Path:
        """Sign a name's key again, for as many days from now; the key stays. ConfigError for a name
        without a certificate, or whose certificate is revoked.
        """
        if name == AUTHORITY:
            certificate = self._load(AUTHORITY)
            return self._sign_itself(self._load_key(AUTHORITY), _common_name(certificate.subject), days)
        current = self._current(name)
        key = current.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        names = current.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uses = current.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        return self._sign(name, key, names, tuple(uses), days)

    def revoke(self, name: str) -> int:
        """Put every certificate of a name that has not expired on the list; how many these are.
        ConfigError if there is none.
        """
        revoked = self._revoked()
        mine = [one for one in self.issued() if one.name == name and one.expires > self._today]
        new = [one for one in mine if not one.is_revoked]
        if not new:
            raise ConfigError(f"{name}: {'revoked already; nothing is left to do' if mine else self._unknown(name)}")
        day = self._today.date().isoformat()
        self._write_list([*revoked.values(), *(f"{one.fingerprint} {one.name} {day}" for one in new)])
        return len(new)

    def issued(self) -> list[Issued]:
        """Every certificate signed so far, the authority's first, then by name; the one that counts
        comes last of its name, whatever its expiry.
        """
        current, revoked = self._fingerprint_of(AUTHORITY), self._revoked()
        found = [_read(self._load(AUTHORITY), frozenset(), current)]
        for file in (self.folder / ISSUED).glob("*.pem"):
            one = x509.load_pem_x509_certificate(file.read_bytes())
            found.append(_read(one, revoked.keys(), self._fingerprint_of(_common_name(one.subject))))
        return sorted(found, key=lambda one: (one.kind != "authority", one.name, one.is_current, one.expires))

    def standing(self, one: Issued) -> str:
        """How it stands with a certificate, in a word or two."""
        if one.is_revoked:
            return "revoked"
        days = (one.expires - self._today).days
        if one.expires <= self._today:
            return "expired"
        return f"{days} days left" + ("" if one.is_current else ", replaced")

    @property
    def revocation_list(self) -> Path:
        """The file of the list."""
        return self.folder / REVOKED

    # -- files -------------------------------------------------------------------------------------

    def _certificate_file(self, name: str) -> Path:
        return self.folder / f"{name}.pem"

    def _key_file(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    def _load(self, name: str) -> x509.Certificate:
        file = self._certificate_file(name)
        try:
            return x509.load_pem_x509_certificate(file.read_bytes())
        except (OSError, ValueError) as error:
            what = "no authority; make one with certs ca" if name == AUTHORITY else self._unknown(name)
            raise ConfigError(f"{self.folder}: {what}") from error

    def _load_key(self, name: str) -> ec.EllipticCurvePrivateKey:
        file = self._key_file(name)
        try:
            key = serialization.load_pem_private_key(file.read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{file}: the key cannot be read; give the one that fedbert-ds certs made, without a password"
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{file}: no ECDSA key; give the one that fedbert-ds certs made")
        return key

    def _new_key(self, name: str) -> ec.EllipticCurvePrivateKey:
        return new_key(self._key_file(name))

    def _fingerprint_of(self, name: str) -> str:
        file = self._certificate_file(name)
        return fingerprint(file.read_text(encoding="ascii")) if file.exists() else ""

    def _revoked(self) -> dict[str, str]:
        """Lines of the list, by fingerprint."""
        try:
            lines = (self.folder / REVOKED).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        return {line.split()[0]: line for line in lines if line.strip() and not line.startswith("#")}

    def _write_list(self, lines: Sequence[str]) -> None:
        head = "# SHA-256 of every revoked certificate, its name, and when. Servers read it: tls.revoked"
        write_text(self.folder / REVOKED, "".join(f"{line}\n" for line in [head, *lines]))

    # -- signing -----------------------------------------------------------------------------------

    def _check_free(self, name: str, hosts: Sequence[str] | None) -> None:
        _check_name(name)
        for host in hosts or ():
            if not _is_host(host):
                raise ConfigError(f"{host}: no host name and no IP address; write one, without port")
        counts = [one for one in self.issued() if one.name == name and one.expires > self._today]
        if any(not one.is_revoked for one in counts):
            raise ConfigError(f"{name}: has a certificate; renew it, or revoke it first")

    def _subject(
        self, name: str, hosts: Sequence[str] | None
    ) -> tuple[x509.SubjectAlternativeName, tuple[x509.ObjectIdentifier, ...]]:
        if hosts is None:
            return x509.SubjectAlternativeName([x509.DNSName(name)]), CLIENT_USES
        everywhere = dict.fromkeys([name, *hosts, *LOOPBACK])
        return x509.SubjectAlternativeName([_general_name(host) for host in everywhere]), SERVER_USES

    def _current(self, name: str) -> x509.Certificate:
        certificate = self._load(name)
        if self._fingerprint_of(name) in self._revoked():
            raise ConfigError(f"{name}: is revoked; issue it a new certificate")
        return certificate

    def _sign(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        names: x509.SubjectAlternativeName,
        uses: Sequence[x509.ObjectIdentifier],
        days: int,
    ) -> Path:
        authority, authority_key = self._load(AUTHORITY), self._load_key(AUTHORITY)
        if authority.not_valid_after_utc <= self._today:
            raise ConfigError(f"{self.folder}: the authority has expired; fedbert-ds certs renew {AUTHORITY}")
        public = authority_key.public_key()
        builder = (
            self._begin(name, authority.subject, key, days, authority.not_valid_after_utc)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(names, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        )
        certificate = builder.sign(authority_key, hashes.SHA256())
        pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
        private_folder(self.folder / ISSUED)
        write_text(self.folder / ISSUED / f"{certificate.serial_number:x}.pem", pem)
        return self._write_certificate(name, pem)

    def _sign_itself(self, key: ec.EllipticCurvePrivateKey, name: str, days: int) -> Path:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            self._begin(name, subject, key.public_key(), days, None)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs=True), critical=True)
        )
        certificate = builder.sign(key, hashes.SHA256())
        return self._write_certificate(AUTHORITY, certificate.public_bytes(serialization.Encoding.PEM).decode())

    def _begin(
        self, name: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int, latest: dt.datetime | None
    ) -> x509.CertificateBuilder:
        ends = self._today + dt.timedelta(days=days)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._today - CLOCK_SKEW)
            # None outlives its authority.
            .not_valid_after(min(ends, latest) if latest is not None else ends)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )

    def _write_certificate(self, name: str, pem: str) -> Path:
        file = self._certificate_file(name)
        write_text(file, pem)
        return file

    def _unknown(self, name: str) -> str:
        known = ", ".join(dict.fromkeys(one.name for one in self.issued() if one.kind != "authority")) or "none yet"
        return f"no certificate of this name here; there are: {known}"


def new_key(file: Path) -> ec.EllipticCurvePrivateKey:
    """A new private key, written for its owner's eyes alone."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with private(), atomic_write(file) as partial:
        partial.write_bytes(pem)
        os.chmod(partial, 0o600)
    return key


def make_request(folder: Path, name: str) -> Path:
    """Make a key in a folder, and a request for a client's certificate of this name; returns the
    request's file. ConfigError for a name that cannot be one, or that has a key there.
    """
    _check_name(name)
    file = folder / f"{name}.key"
    if file.exists():
        raise ConfigError(f"{file}: exists; remove it, or set another --dir")
    private_folder(folder)
    key = new_key(file)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    pem = request.public_bytes(serialization.Encoding.PEM).decode()
    write_text(folder / f"{name}.csr", pem)
    return folder / f"{name}.csr"


def _check_name(name: str) -> None:
    if not is_name(name) or name == AUTHORITY:
        raise ConfigError(
            f"{name or 'an empty name'}: a name is up to {LONGEST_NAME} letters, digits and .-_@+, begins with a "
            f"letter or digit, and is not {AUTHORITY}"
        )


def _read(certificate: x509.Certificate, revoked: Container[str], current: str) -> Issued:
    """What a certificate says; `current` is the fingerprint of the one that its name has now."""
    mine = fingerprint(certificate.public_bytes(serialization.Encoding.PEM).decode())
    names: list[str] = []
    kind = "authority"
    for extension in certificate.extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            names = [str(name.value) for name in extension.value]
        elif isinstance(extension.value, x509.ExtendedKeyUsage):
            kind = "server" if ExtendedKeyUsageOID.SERVER_AUTH in extension.value else "client"
    return Issued(
        name=certificate_name(_common_name(certificate.subject), names),
        kind=kind,
        hosts=tuple(names) if kind == "server" else (),
        expires=certificate.not_valid_after_utc,
        fingerprint=mine,
        is_revoked=mine in revoked,
        is_current=mine == current,
    )


def _is_host(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return len(text) <= 253 and _HOST.fullmatch(text) is not None
    return True


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _common_name(subject: x509.Name) -> str:
    names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def _key_usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
