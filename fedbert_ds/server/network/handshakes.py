"""Failed TLS handshakes at a process that listens, told as sentences.

gRPC hands no failed handshake to Python: it writes a line of its own for each on standard error,
many for one client that dials again and again. Here standard error goes through a pipe. These lines
become refusals, of which few are told and all counted; every other line passes as it is.
"""

from __future__ import annotations

import atexit
import os
import re
import threading
from typing import BinaryIO

from fedbert_ds.server.network.door import Refusals

_FLUSH_SECONDS = 5.0
"""How long a process's end waits for its last lines: another process may hold the pipe open."""

_FAILED = re.compile(rb"Handshake failed with error .*?OPENSSL_internal:([A-Z0-9_]+):? ?(.*)")

_SENTENCES = {
    "WRONG_VERSION_NUMBER": "a caller speaks plain text, and this port TLS",
    "HTTP_REQUEST": "a caller speaks plain text, and this port TLS",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "a caller shows no certificate",
    "certificate has expired": "a caller's certificate has expired",
    "certificate is not yet valid": "a caller's certificate does not count yet; check the clocks",
    "unable to get local issuer certificate": "a caller's certificate is of another authority",
    "self signed certificate": "a caller's certificate is of another authority",
    "self signed certificate in certificate chain": "a caller's certificate is of another authority",
    "unsupported certificate purpose": "a caller's certificate is no client's",
    "TLSV1_ALERT_UNKNOWN_CA": "a caller does not trust this server's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "a caller takes this server's certificate for expired",
}


def sentence(line: bytes) -> str | None:
    """What a line of gRPC's says of a failed handshake; None if it is about something else."""
    found = _FAILED.search(line)
    if found is None:
        return None
    kind, detail = (part.decode(errors="replace").strip() for part in found.groups())
    known = _SENTENCES.get(detail) or _SENTENCES.get(kind)
    return known or f"a caller's TLS handshake failed: {kind.lower().replace('_', ' ')}"


def relay(lines: BinaryIO, onwards: int, refusals: Refusals) -> None:
    """Pass lines on to a descriptor until they end, but for those of failed handshakes."""
    for line in lines:
        reason = sentence(line)
        if reason is None:
            os.write(onwards, line)
        else:
            refusals.add(reason)
    refusals.close()


def tell_failed_handshakes() -> None:
    """Put the relay before this process's standard error, until its end."""
    onwards = os.dup(2)
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    lines = os.fdopen(reading, "rb")
    thread = threading.Thread(target=relay, args=(lines, onwards, Refusals()), name="handshakes", daemon=True)
    thread.start()

    def tell_the_last() -> None:
        os.dup2(onwards, 2)  # the pipe's last end that writes: the relay finds no more behind its lines
        thread.join(_FLUSH_SECONDS)

    atexit.register(tell_the_last)
