"""Who the other side is: names, the name in a certificate, certificates that are revoked.

Nothing here needs more than Python's own `ssl`: every client has it.
"""

from __future__ import annotations

import hashlib
import re
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedbert_ds.errors import WireError

LONGEST_NAME = 64
"""Characters of a client's name: an X.509 common name has no more."""

TOKEN_VARIABLE = "FEDBERT_CLIENT_TOKEN"
"""Environment variable with the secret that a launcher hands to its local client."""

_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._@+-]{{0,{LONGEST_NAME - 1}}}")


def is_name(name: str) -> bool:
    """Whether a client may have this name: it goes into certificates, logs and file names."""
    return _NAME.fullmatch(name) is not None


def certificate_name(common_name: str, alternatives: Sequence[str]) -> str:
    """The one name of a certificate, so that it takes one seat: the subject's common name if it is
    among the subject's alternative names, or the first of these, or the common name without any.
    """
    if not alternatives or common_name in alternatives:
        return common_name
    return alternatives[0]


def name_of_peer(auth_context: Mapping[str, Sequence[bytes]]) -> str:
    """The name in the certificate that gRPC has verified; empty without one."""
    names = [name.decode(errors="replace") for name in auth_context.get("x509_subject_alternative_name", ())]
    common = [name.decode(errors="replace") for name in auth_context.get("x509_common_name", ())]
    return certificate_name(common[0] if common else "", names)


def fingerprint_of_peer(auth_context: Mapping[str, Sequence[bytes]]) -> str:
    """SHA-256 of the verified certificate, in hexadecimal digits; empty without one."""
    pem = next(iter(auth_context.get("x509_pem_cert", ())), b"")
    return fingerprint(pem.decode(errors="replace")) if pem else ""


def fingerprint(pem: str) -> str:
    """SHA-256 of a PEM certificate's DER bytes, in hexadecimal digits."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.strip() + "\n")).hexdigest()


class RevocationList:
    """Fingerprints that no longer count: a text file, a line each, the fingerprint first.

    `fedbert-ds certs revoke` writes it. It is read again whenever it changes, so that a revocation
    acts on a run that is under way.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._fingerprints: frozenset[str] = frozenset()

    def holds(self, fingerprint: str) -> bool:
        """Whether this certificate is revoked. Raises WireError if the list cannot be read."""
        self.read()
        return fingerprint in self._fingerprints

    def read(self) -> bool:
        """Read the list if it has changed; whether it had. Raises WireError if it cannot be read:
        nobody is let in by a list that is gone.
        """
        try:
            facts = self._path.stat()
            seen = facts.st_mtime_ns, facts.st_size
            if seen == self._seen:
                return False
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise WireError(f"{self._path}: the revocation list cannot be read; check tls.revoked") from error
        words = [line.split()[0].lower() for line in lines if line.strip() and not line.startswith("#")]
        for word in words:
            if re.fullmatch("[0-9a-f]{64}", word) is None:
                raise WireError(f"{self._path}: no line of a revocation list: {word[:80]}; check tls.revoked")
        self._fingerprints, self._seen = frozenset(words), seen
        return True
