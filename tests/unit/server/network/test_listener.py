"""Mutual TLS at a rank's endpoint: who is let in, and files that do not fit."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from unit.server.network.loopback import TIMEOUT, Listening, Stream, listening, save

from fedbert_ds.errors import WireError
from fedbert_ds.server.network.endpoint import Endpoint
from fedbert_ds.server.network.events import Connected, Disconnected
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.channel import TlsFiles, connect, server_credentials
from fedbert_ds.wire.introduction import join


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TlsFiles]:
    """Makes TLS files with openssl: `sign("stranger")` by another authority than all others."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command: mutual TLS is not tested")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=30)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]

    def sign(name: str) -> TlsFiles:
        ca = "other-ca" if name == "stranger" else "ca"
        if not (folder / f"{ca}.pem").exists():
            openssl(
                "req", "-x509", *key, "-days", "2", "-subj", f"/CN={ca}", "-keyout", f"{ca}.key", "-out", f"{ca}.pem"
            )
        if not (folder / f"{name}.pem").exists():
            openssl("req", *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
            (folder / "extensions").write_text("subjectAltName = IP:127.0.0.1, DNS:localhost\n")
            openssl(
                "x509", "-req", "-in", f"{name}.csr", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial",
                "-days", "2", "-extfile", "extensions", "-out", f"{name}.pem",
            )  # fmt: skip
        return TlsFiles(folder / f"{ca}.pem", folder / f"{name}.pem", folder / f"{name}.key")

    return sign


@pytest.fixture(scope="module")
def secure(authority: Callable[[str], TlsFiles]) -> Iterator[Listening]:
    with listening(tls=authority("server")) as started:
        yield started


def test_mutual_tls_lets_a_signed_client_in(secure: Listening, authority: Callable[[str], TlsFiles]) -> None:
    stream = Stream(secure.address, "ada", tls=authority("client"))
    assert secure.event() == Connected("ada")
    secure.real.send("ada", save(1))
    assert stream.receive() == save(1)
    stream.end()
    assert secure.event() == Disconnected("ada")


@pytest.mark.parametrize("who", ["plaintext", "no certificate", "a certificate of another authority"])
def test_mutual_tls_keeps_everybody_else_out(secure: Listening, authority: Callable[[str], TlsFiles], who: str) -> None:
    ca = authority("server").ca.read_bytes()
    if who == "plaintext":
        channel = grpc.insecure_channel(secure.address)
    elif who == "no certificate":
        channel = grpc.secure_channel(secure.address, grpc.ssl_channel_credentials(ca))
    else:
        _, certificate, key = authority("stranger").read()
        channel = grpc.secure_channel(secure.address, grpc.ssl_channel_credentials(ca, key, certificate))
    with channel:
        with pytest.raises(grpc.RpcError) as caught:
            join(channel, pb.Hello(client="eve"), 5).result()
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    secure.no_event()


def test_a_client_does_not_trust_a_server_of_another_authority(authority: Callable[[str], TlsFiles]) -> None:
    with listening(tls=authority("stranger")) as stranger:
        with connect(stranger.address, authority("client")) as channel, pytest.raises(grpc.RpcError) as caught:
            join(channel, pb.Hello(client="ada"), TIMEOUT).result()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        stranger.no_event()


def test_tls_files_that_cannot_be_read_are_one_line(authority: Callable[[str], TlsFiles], tmp_path: Path) -> None:
    good = authority("server")
    for field in ("ca", "certificate", "key"):
        files = TlsFiles(
            **({"ca": good.ca, "certificate": good.certificate, "key": good.key} | {field: tmp_path / "x"})
        )
        for use in (server_credentials, lambda files: connect("127.0.0.1:1", files)):
            with pytest.raises(WireError, match=r"x: cannot be read: No such file or directory; check the TLS files"):
                use(files)


@pytest.mark.parametrize("field", ["ca", "certificate", "key"])
def test_tls_files_that_do_not_fit_are_one_line(
    authority: Callable[[str], TlsFiles], tmp_path: Path, field: str
) -> None:
    """Text that is no PEM, and the key of another certificate: both ends say so."""
    good, text = authority("server"), tmp_path / "text.pem"
    text.write_text("-----BEGIN CERTIFICATE-----\nnothing\n-----END CERTIFICATE-----\n")
    wrong = [text] if field == "ca" else [text, getattr(authority("client"), field)]
    for path in wrong:
        files = TlsFiles(**({"ca": good.ca, "certificate": good.certificate, "key": good.key} | {field: path}))
        with pytest.raises(WireError, match=r"not PEM files .*; check the TLS files"):
            connect("127.0.0.1:1", files)
        refused = Endpoint("127.0.0.1", 0, files)
        with pytest.raises(WireError, match=r"not PEM files .*; check the TLS files"):
            refused.start()
        refused.stop(grace=0.1)
