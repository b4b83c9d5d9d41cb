"""Mutual TLS seen from one side: its files, what its own certificate says, what is wrong with the
other side.

gRPC tells of a failed handshake only that there was no connection. Python's own `ssl` shakes hands
here to find the reason: with itself in memory, or with a server that gRPC does not reach.
"""

from __future__ import annotations

import ssl
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fedbert_ds.errors import WireError
from fedbert_ds.wire.http_proxy import ProxyRefused, dial
from fedbert_ds.wire.identity import certificate_name

NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which `ssl` does not name."""

ROUND_TRIPS = 5
"""More than a handshake has."""

EXPIRES_SOON_SECONDS = 30 * 86400.0

DAY = "%Y-%m-%d"


@dataclass(frozen=True)
class OwnCertificate:
    """What one's own certificate says."""

    name: str
    """As the other side reads it."""
    begins: float
    """Seconds since 1970, as `expires`."""
    expires: float

    @property
    def days_left(self) -> float:
        """Until it expires."""
        return (self.expires - time.time()) / 86400


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of one side of mutual TLS."""

    ca: Path
    certificate: Path
    key: Path

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Contents of ca, certificate and key; WireError if unreadable, no match or out of date."""
        contents = []
        for path in (self.ca, self.certificate, self.key):
            try:
                contents.append(path.read_bytes())
            except OSError as error:
                raise WireError(f"{path}: cannot be read: {error.strerror}; check the TLS files") from error
        try:
            # gRPC would report an unreachable server or a port that cannot be opened.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(self.ca)
            context.load_cert_chain(self.certificate, self.key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise WireError(
                f"{self.ca}, {self.certificate}, {self.key}: not PEM files of an authority, a certificate and its key "
                "without a password; check the TLS files"
            ) from error
        self._check_dates(self.own_certificate())
        return contents[0], contents[1], contents[2]

    def own_certificate(self) -> OwnCertificate:
        """What the certificate says, whether it is out of date or not. WireError if no client may
        show it.
        """
        asks, shows = self._context(ssl.PROTOCOL_TLS_SERVER), self._context(ssl.PROTOCOL_TLS_CLIENT)
        shows.check_hostname, shows.verify_mode = False, ssl.CERT_NONE
        asks.verify_mode = ssl.CERT_REQUIRED
        facts = cast(dict[str, Any], self._shake_hands(asks, shows)[0].getpeercert())
        common = [value for part in facts.get("subject", ()) for key, value in part if key == "commonName"]
        names = [name for _, name in facts.get("subjectAltName", ())]
        begins, expires = (ssl.cert_time_to_seconds(facts[key]) for key in ("notBefore", "notAfter"))
        return OwnCertificate(certificate_name(common[0] if common else "", names), begins, expires)

    def check_host(self, host: str) -> None:
        """WireError if others who dial this host will not take the certificate for its own."""
        asks = self._context(ssl.PROTOCOL_TLS_CLIENT)
        try:
            self._shake_hands(self._context(ssl.PROTOCOL_TLS_SERVER), asks, host)
        except WireError as error:
            cause = error.__cause__
            if isinstance(cause, ssl.SSLCertVerificationError) and cause.verify_code in (62, 64):
                raise WireError(
                    f"{self.certificate}: is not for {host}, which clients dial; make one for it, or name another host"
                ) from cause
            raise

    def is_of_own_authority(self) -> bool:
        """Whether the certificate is signed by the authority that the other side must have."""
        asks, shows = self._context(ssl.PROTOCOL_TLS_SERVER, self.ca), self._context(ssl.PROTOCOL_TLS_CLIENT)
        shows.check_hostname, shows.verify_mode = False, ssl.CERT_NONE
        asks.verify_mode = ssl.CERT_REQUIRED
        try:
            self._shake_hands(asks, shows)
        except WireError:
            return False
        return True

    def _context(self, protocol: int, trusted: Path | None = None) -> ssl.SSLContext:
        """Trusts what is in a file, or the certificate itself and nothing else; at any time."""
        context = ssl.SSLContext(protocol)
        context.load_cert_chain(self.certificate, self.key, password="")
        context.load_verify_locations(trusted or self.certificate)
        context.verify_flags |= ssl.VerifyFlags(ssl.VERIFY_X509_PARTIAL_CHAIN | NO_CHECK_TIME)
        return context

    def _shake_hands(
        self, server: ssl.SSLContext, client: ssl.SSLContext, host: str | None = None
    ) -> tuple[ssl.SSLObject, ssl.SSLObject]:
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        dials = client.wrap_bio(down, up, server_hostname=host)
        listens = server.wrap_bio(up, down, server_side=True)
        try:
            for _ in range(ROUND_TRIPS):
                for side in (dials, listens):
                    with suppress(ssl.SSLWantReadError):
                        side.do_handshake()
        except ssl.SSLError as error:
            raise WireError(f"{self.certificate}: cannot be used: {_reason(error)}; check the TLS files") from error
        return listens, dials

    def _check_dates(self, own: OwnCertificate) -> None:
        now = time.time()
        if own.expires <= now:
            day = time.strftime(DAY, time.gmtime(own.expires))
            raise WireError(f"{self.certificate}: has expired on {day}; renew it (fedbert-ds certs renew)")
        if own.begins > now:
            day = time.strftime(DAY, time.gmtime(own.begins))
            raise WireError(f"{self.certificate}: counts from {day} on; check this machine's clock")


def expiry_warning(tls: TlsFiles) -> str | None:
    """A sentence about a certificate of one's own that expires soon. Raises as `TlsFiles.read`."""
    own = tls.own_certificate()
    if own.days_left * 86400 > EXPIRES_SOON_SECONDS:
        return None
    return f"{tls.certificate} expires in {own.days_left:.0f} days; renew it (fedbert-ds certs renew)"


def tls_fault(address: str, tls: TlsFiles | None, seconds: float = 5.0) -> str | None:
    """What keeps TLS from the server at host:port, in a sentence; None if it is not TLS. A proxy
    on the way that will not let it through is told, too.

    Dials the server once more, by itself.
    """
    host = address.rpartition(":")[0].strip("[]")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if tls is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    else:
        context.load_verify_locations(tls.ca)
        context.load_cert_chain(tls.certificate, tls.key, password="")
    try:
        with (
            dial(address, seconds) as line,
            context.wrap_socket(line, server_hostname=host) as secured,
        ):
            if tls is None:
                return "speaks TLS, and this side has no certificate to show; give it one"
            # The server judges this side's certificate after the handshake. gRPC's hangs up then,
            # in place of its first word.
            if not secured.recv(1) and not tls.is_of_own_authority():
                return _UNKNOWN_AUTHORITY
    except ssl.SSLCertVerificationError as error:
        return _fault_of_theirs(error, host)
    except ssl.SSLError as error:
        return _fault_of_alert(error.reason or "", tls is not None)
    except ProxyRefused as error:
        return str(error)
    except (OSError, ValueError):
        pass
    return None


_UNKNOWN_AUTHORITY = (
    "does not know the authority that signed this side's certificate; compare the CA files, or have it signed anew"
)


def _fault_of_theirs(error: ssl.SSLCertVerificationError, host: str) -> str:
    match error.verify_code:
        case 10:
            return "its certificate has expired; it must be renewed"
        case 9:
            return "its certificate does not count yet; check the clocks of both machines"
        case 62 | 64:
            return f"its certificate is not for {host}; dial a name that is in it"
        case 2 | 18 | 19 | 20 | 21:
            return "its certificate is signed by another authority than this side's CA file; compare the CA files"
        case 26:
            return "its certificate is no server's"
        case _:
            return f"its certificate does not hold: {error.verify_message}"


def _fault_of_alert(reason: str, shows_certificate: bool) -> str | None:
    if "WRONG_VERSION_NUMBER" in reason or "UNKNOWN_PROTOCOL" in reason or "HTTP_REQUEST" in reason:
        return (
            "speaks plain text, and this side TLS; check the port, and TLS at the server" if shows_certificate else None
        )
    if "ALERT" not in reason:
        return None
    if not shows_certificate:
        return "speaks TLS, and this side has no certificate to show; give it one"
    if "CERTIFICATE_EXPIRED" in reason:
        return "takes this side's certificate for expired; renew it, or check the clocks of both machines"
    if "UNKNOWN_CA" in reason:
        return _UNKNOWN_AUTHORITY
    return f"refuses this side's certificate ({reason.lower().replace('_', ' ')})"


def _reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return (error.reason or "no TLS").lower().replace("_", " ")
