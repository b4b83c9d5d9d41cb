"""What is wrong between two sides is named, by either, against real gRPC servers."""

from __future__ import annotations

import datetime as dt
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest

from fedbert_ds.certificates.authority import Authority
from fedbert_ds.errors import WireError
from fedbert_ds.wire.channel import await_ready, connect
from fedbert_ds.wire.tls import TlsFiles, expiry_warning, tls_fault

NOW = dt.datetime.now(dt.timezone.utc)


class Made(NamedTuple):
    """Certificates of one authority: two of them have expired."""

    server: TlsFiles
    client: TlsFiles
    expired_server: TlsFiles
    expired_client: TlsFiles


def authority_in(folder: Path, today: dt.datetime = NOW) -> Authority:
    return Authority(folder, today)


def make(folder: Path) -> Made:
    past = authority_in(folder, NOW - dt.timedelta(days=100))
    past.create("an authority", 3000)
    now = authority_in(folder)

    def files(certificate: Path) -> TlsFiles:
        return TlsFiles(folder / "ca.pem", certificate, certificate.with_suffix(".key"))

    return Made(
        files(now.issue("body", 300, hosts=["body.example"])),
        files(now.issue("ada", 300)),
        files(past.issue("old-body", 9, hosts=[])),
        files(past.issue("old-ada", 9)),
    )


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("theirs"))


@pytest.fixture
def serve() -> Iterator[Callable[[TlsFiles | None], int]]:
    """Starts a server that shows these files, or speaks plain text; returns its port."""
    running: list[grpc.Server] = []

    def start(files: TlsFiles | None) -> int:
        server = grpc.server(ThreadPoolExecutor(1))
        running.append(server)
        if files is None:
            port = server.add_insecure_port("0.0.0.0:0")
        else:
            # Not by `server_credentials`, which refuses one's own mistakes.
            pair = files.key.read_bytes(), files.certificate.read_bytes()
            credentials = grpc.ssl_server_credentials([pair], files.ca.read_bytes(), require_client_auth=True)
            port = server.add_secure_port("0.0.0.0:0", credentials)
        server.start()
        return port

    yield start
    for server in running:
        server.stop(None)


def foreign(trusted: Made, shown: Made) -> TlsFiles:
    """Trusts one authority and shows another's certificate."""
    return TlsFiles(trusted.client.ca, shown.client.certificate, shown.client.key)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("a server of another authority", "its certificate is signed by another authority than this side's CA file"),
        ("a client of another authority", "does not know the authority that signed this side's certificate"),
        ("a server that has expired", "its certificate has expired; it must be renewed"),
        ("a server of another name", "its certificate is not for 127.0.0.2; dial a name that is in it"),
        ("a plaintext server", "speaks plain text, and this side TLS"),
        ("a plaintext client", "speaks TLS, and this side has no certificate to show"),
        ("a client that poses as a server", "its certificate is no server's"),
    ],
)
def test_what_is_wrong_is_named_before_a_wait_is_over(
    serve: Callable[[TlsFiles | None], int], ours: Made, theirs: Made, case: str, reason: str
) -> None:
    server: TlsFiles | None = ours.server
    client: TlsFiles | None = ours.client
    host = "127.0.0.1"
    if case == "a server of another authority":
        server = theirs.server
    elif case == "a client of another authority":
        client = foreign(ours, theirs)
    elif case == "a server that has expired":
        server = ours.expired_server
    elif case == "a server of another name":
        host = "127.0.0.2"
    elif case == "a plaintext server":
        server = None
    elif case == "a plaintext client":
        client = None
    else:
        server = ours.client
    address = f"{host}:{serve(server)}"
    with connect(address, client) as channel, pytest.raises(WireError) as caught:
        await_ready(channel, address, client, seconds=3600)
    assert str(caught.value).startswith(f"{address}: ") and reason in str(caught.value)


@pytest.mark.parametrize("has_tls", [True, False])
def test_two_sides_that_fit_have_no_fault(serve: Callable[[TlsFiles | None], int], ours: Made, has_tls: bool) -> None:
    files = ours.client if has_tls else None
    address = f"localhost:{serve(ours.server if has_tls else None)}"
    assert tls_fault(address, files) is None
    with connect(address, files) as channel:
        await_ready(channel, address, files, seconds=20)


def test_nobody_there_is_no_fault_of_tls(ours: Made) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for files in (ours.client, None):
            assert tls_fault(address, files) is None
            with connect(address, files) as channel, pytest.raises(grpc.FutureTimeoutError):
                await_ready(channel, address, files, seconds=0.2)
    assert tls_fault("no.such.host.invalid:1", ours.client) is None


def test_who_listens_and_says_nothing_is_no_fault_of_tls(ours: Made) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert tls_fault(f"127.0.0.1:{silent.getsockname()[1]}", ours.client, seconds=0.2) is None


@pytest.mark.parametrize("which", ["expired_server", "expired_client"])
def test_an_expired_certificate_is_named_at_home(ours: Made, which: str) -> None:
    files: TlsFiles = getattr(ours, which)
    day = (NOW - dt.timedelta(days=91)).strftime("%Y-%m-%d")
    with pytest.raises(WireError, match=rf"pem: has expired on {day}; renew it \(fedbert-ds certs renew\)"):
        files.read()
    with pytest.raises(WireError, match="has expired"):
        connect("127.0.0.1:1", files)


def test_a_certificate_of_tomorrow_is_named_at_home(tmp_path: Path) -> None:
    later = authority_in(tmp_path, NOW + dt.timedelta(days=2))
    later.create("an authority", 300)
    certificate = later.issue("ada", 30)
    files = TlsFiles(tmp_path / "ca.pem", certificate, certificate.with_suffix(".key"))
    with pytest.raises(WireError, match=r"ada\.pem: counts from .* on; check this machine's clock"):
        files.read()


def test_a_certificate_says_its_name_and_its_hosts(ours: Made) -> None:
    assert ours.client.own_certificate().name == "ada"
    assert ours.server.own_certificate().name == "body"
    assert ours.expired_client.own_certificate().name == "old-ada"
    for host in ("body", "body.example", "localhost", "127.0.0.1", "::1"):
        ours.server.check_host(host)
    for host in ("elsewhere.example", "10.0.0.9"):
        with pytest.raises(WireError, match=f"body.pem: is not for {host}, which clients dial; make one for it"):
            ours.server.check_host(host)


def test_a_warning_comes_before_the_day(tmp_path: Path, ours: Made) -> None:
    assert expiry_warning(ours.server) is None
    soon = authority_in(tmp_path)
    soon.create("an authority", 300)
    certificate = soon.issue("ada", 10)
    files = TlsFiles(tmp_path / "ca.pem", certificate, certificate.with_suffix(".key"))
    assert (expiry_warning(files) or "").endswith("ada.pem expires in 10 days; renew it (fedbert-ds certs renew)")
