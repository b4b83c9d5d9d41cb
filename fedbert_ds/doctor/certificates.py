"""The files of mutual TLS: whether they are there, count now, belong together and fit the names."""

from __future__ import annotations

import os
import ssl
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from fedbert_ds.doctor.finding import Finding, fault, of_error, ok, tried, warning
from fedbert_ds.errors import WireError
from fedbert_ds.wire.identity import RevocationList, fingerprint
from fedbert_ds.wire.tls import DAY, TlsFiles, expiry_warning


def certificate_findings(tls: TlsFiles, hosts: Sequence[str] = (), revoked: Path | None = None) -> Iterator[Finding]:
    """Findings about one side's files; `hosts` are the names that others dial this side by."""
    try:
        tls.read()
    except WireError as error:
        yield of_error("certificate", error)
        return
    own = tls.own_certificate()
    if (told := expiry_warning(tls)) is not None:
        says, _, remedy = told.partition("; ")
        yield warning("certificate", says, remedy)
    else:
        yield ok("certificate", f"{tls.certificate} is {own.name}'s, until {_day(own.expires)}; its key matches")
    if tls.is_of_own_authority():
        yield ok("authority", f"{tls.ca} has signed it")
    else:
        yield fault(
            "authority",
            f"{tls.ca} has not signed {tls.certificate}",
            "take the authority's ca.pem, or have it signed anew",
        )
    yield from _authority(tls.ca)
    for host in hosts:
        with suppress(UnicodeError):  # no name at all, which is told elsewhere
            yield tried("certificate", partial(tls.check_host, host), f"is for {host}, as clients dial it")
    yield from _key(tls.key)
    if revoked is not None:
        yield _revoked(tls, revoked)


def _authority(ca: Path) -> Iterator[Finding]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca)
    now = time.time()
    for one in context.get_ca_certs():
        begins, expires = (ssl.cert_time_to_seconds(str(one[key])) for key in ("notBefore", "notAfter"))
        if expires <= now:
            yield fault("authority", f"{ca} has expired on {_day(expires)}", "renew it: fedbert-ds certs renew ca")
        elif begins > now:
            yield fault("authority", f"{ca} counts from {_day(begins)} on", "check this machine's clock")


def _key(key: Path) -> Iterator[Finding]:
    if os.name == "posix" and key.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield warning("key", f"{key} can be read by others on this machine", f"chmod 600 {key}")


def _revoked(tls: TlsFiles, path: Path) -> Finding:
    listed = RevocationList(path)
    try:
        if listed.holds(fingerprint(tls.certificate.read_text(encoding="utf-8"))):
            return fault("revoked", f"{tls.certificate} is on {path}", "have a new one signed")
    except WireError as error:
        return of_error("revoked", error)
    return ok("revoked", f"{path} can be read")


def _day(seconds: float) -> str:
    return time.strftime(DAY, time.gmtime(seconds))
