"""What gRPC writes about failed handshakes, as sentences; and a real server's, in a process."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedbert_ds.certificates.authority import Authority
from fedbert_ds.server.network.door import TOLD_AT_ONCE, Refusals
from fedbert_ds.server.network.handshakes import relay, sentence
from fedbert_ds.wire.verbosity import VARIABLE

HEAD = "I1129 08:42:41.640476    4680 ssl_transport_security.cc:2125] Handshake failed with error SSL_ERROR_SSL: "
OPENSSL = "error:1000007d:SSL routines:OPENSSL_internal:"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("CERTIFICATE_VERIFY_FAILED: certificate has expired", "a caller's certificate has expired"),
        (
            "CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate",
            "a caller's certificate is of another authority",
        ),
        (
            "WRONG_VERSION_NUMBER: Invalid certificate verification context",
            "a caller speaks plain text, and this port TLS",
        ),
        ("PEER_DID_NOT_RETURN_A_CERTIFICATE: Invalid context", "a caller shows no certificate"),
        ("NO_SHARED_CIPHER", "a caller's TLS handshake failed: no shared cipher"),
    ],
)
def test_a_failed_handshake_is_a_sentence(words: str, told: str) -> None:
    assert sentence(f"{HEAD}{OPENSSL}{words}\n".encode()) == told


def test_other_lines_pass_as_they_are() -> None:
    lines: list[str] = []
    others = [b"Traceback (most recent call last):\n", b"\xff\x1b[2J\n", b"no end of line"]
    failed = f"{HEAD}{OPENSSL}HTTP_REQUEST\n".encode()
    reading, writing = os.pipe()
    relay(io.BytesIO(b"".join([failed, *others[:2], *[failed] * 99, others[2]])), writing, Refusals(lines.append))
    os.close(writing)
    with os.fdopen(reading, "rb") as passed:
        assert passed.read() == b"".join(others)
    assert len(lines) == TOLD_AT_ONCE + 1 and lines[-1] == f"refused: {100 - TOLD_AT_ONCE} others"


ENDS = """
import os
import sys
from fedbert_ds.server.network.handshakes import tell_failed_handshakes

tell_failed_handshakes()
os.write(2, sys.argv[1].encode() * 100 + b"a last word\\n")
"""


def test_lines_of_a_process_s_last_moment_are_told_and_counted() -> None:
    line = f"{HEAD}{OPENSSL}HTTP_REQUEST\n"
    ended = subprocess.run([sys.executable, "-c", ENDS, line], capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stderr) == (0, "a last word\n")
    assert ended.stdout.splitlines()[-1] == f"refused: {100 - TOLD_AT_ONCE} others"


LISTENS = """
import sys
from pathlib import Path
from fedbert_ds.server.network.endpoint_process import EndpointProcess
from fedbert_ds.wire.tls import TlsFiles

folder = Path(sys.argv[1])
endpoint = EndpointProcess("127.0.0.1", 0, TlsFiles(folder / "ca.pem", folder / "body.pem", folder / "body.key"))
print(endpoint.start(), flush=True)
sys.stdin.read()
endpoint.stop(0.1)
"""

STRANGER = """
import sys
import grpc

with grpc.insecure_channel(f"127.0.0.1:{sys.argv[1]}") as channel:
    for _ in range(30):
        try:
            channel.unary_unary("/fedbert.Federation/Join")(b"", timeout=20)
        except grpc.RpcError:
            pass
"""


@pytest.mark.parametrize("verbosity", [None, "ERROR"])
def test_strangers_at_the_port_are_told_and_counted(tmp_path: Path, verbosity: str | None) -> None:
    """gRPC dials again and again for each of them; the log has a few lines, whatever gRPC itself
    is to write.
    """
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {VARIABLE: verbosity} if verbosity else {}
    authority = Authority(tmp_path)
    authority.create("an authority", 100)
    authority.issue("body", 90, hosts=[])
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    listening = subprocess.Popen([sys.executable, "-c", LISTENS, str(tmp_path)], env=environment, **pipes)
    assert listening.stdout is not None
    port = listening.stdout.readline().strip()
    stranger = subprocess.run([sys.executable, "-c", STRANGER, port], capture_output=True, timeout=100)
    assert stranger.returncode == 0
    told, _ = listening.communicate(timeout=60)
    lines = told.splitlines()
    assert lines[0] == "refused: a caller speaks plain text, and this port TLS"
    assert len(lines) <= TOLD_AT_ONCE + 1 and "Handshake failed" not in told
