"""Proxies: never for own addresses, by either spelling for others, and named where they fail.

Addresses of another machine are dialled through a small proxy here, which connects to this one.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from fedbert_ds.certificates.authority import Authority
from fedbert_ds.errors import WireError
from fedbert_ds.wire.channel import await_ready, connect
from fedbert_ds.wire.http_proxy import ProxyRefused, dial, proxy_note, proxy_of, proxy_options
from fedbert_ds.wire.tls import TlsFiles, tls_fault

ELSEWHERE = "body.example:29600"
SECONDS = 30.0


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy", "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class ConnectProxy:
    """Answers CONNECT with a status, and passes bytes on to `port` of this machine if it is 200."""

    def __init__(self, port: int = 0, status: str = "200 OK") -> None:
        self._port, self._status = port, status
        self.requests: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(SECONDS)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._lines: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for line in self._lines:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                line, _ = self._listener.accept()
                self._lines.append(line)
                threading.Thread(target=self._serve, args=(line,), daemon=True).start()

    def _serve(self, line: socket.socket) -> None:
        with suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request and (more := line.recv(4096)):
                request += more
            self.requests.append(request.decode())
            line.sendall(f"HTTP/1.1 {self._status}\r\n\r\n".encode())
            if not self._status.startswith("200"):
                line.shutdown(socket.SHUT_RDWR)
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            self._lines.append(server)
            threading.Thread(target=self._pass_on, args=(server, line), daemon=True).start()
            self._pass_on(line, server)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while part := source.recv(1 << 16):
                target.sendall(part)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def files(tmp_path: Path) -> TlsFiles:
    authority = Authority(tmp_path)
    authority.create("an authority", 100)
    certificate = authority.issue("body", 90, hosts=["body.example"])
    return TlsFiles(tmp_path / "ca.pem", certificate, certificate.with_suffix(".key"))


@pytest.fixture
def port(files: TlsFiles) -> Iterator[int]:
    """Of a server on this machine whose certificate is for body.example."""
    server = grpc.server(ThreadPoolExecutor(1))
    pair = files.key.read_bytes(), files.certificate.read_bytes()
    credentials = grpc.ssl_server_credentials([pair], files.ca.read_bytes(), require_client_auth=True)
    found = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield found
    server.stop(None)


@pytest.mark.parametrize(
    "variable", ["https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "grpc_proxy", "ALL_PROXY"]
)
def test_a_remote_server_is_reached_through_the_proxy_with_its_certificate_checked(
    monkeypatch: pytest.MonkeyPatch, port: int, files: TlsFiles, variable: str
) -> None:
    proxy = ConnectProxy(port)
    monkeypatch.setenv(variable, f"http://ada:se%3Acret@{proxy.address}")
    try:
        with connect(ELSEWHERE, files) as channel:
            await_ready(channel, ELSEWHERE, files, SECONDS)
        assert tls_fault(ELSEWHERE, files) is None
    finally:
        proxy.stop()
    assert len(proxy.requests) >= 2
    for request in proxy.requests:
        assert request.startswith(f"CONNECT {ELSEWHERE} HTTP/1.1\r\n")
        assert "Proxy-Authorization:Basic YWRhOnNlOmNyZXQ=" in request.replace(": ", ":")


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy", "HTTPS_PROXY", "ALL_PROXY"])
def test_own_addresses_are_dialled_directly_whatever_is_set(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        with connect(address, None) as channel:
            await_ready(channel, address, None, SECONDS)
    finally:
        server.stop(None)


def test_which_addresses_go_through_a_proxy() -> None:
    everywhere = {"http_proxy": "http://squid.example:3128"}
    for own in ("127.0.0.1:5", "localhost:5", "0.0.0.0:5", "unix:/tmp/socket"):
        assert proxy_of(own, everywhere) is None, own
    for other in (ELSEWHERE, "192.0.2.7:5", "[2001:db8::7]:5"):
        assert str(proxy_of(other, everywhere)) == "the proxy squid.example:3128 (http_proxy)", other


@pytest.mark.parametrize(
    ("listed", "direct"),
    [
        ("body.example", True),
        ("other, .example", True),
        ("*.example", True),
        ("*", True),
        ("BODY.EXAMPLE", True),
        ("other.example", False),
        ("", False),
        ("192.0.2.0/24", False),
    ],
)
@pytest.mark.parametrize("variable", ["no_proxy", "NO_PROXY", "no_grpc_proxy"])
def test_hosts_that_need_no_proxy(listed: str, direct: bool, variable: str) -> None:
    environment = {"https_proxy": "http://squid.example:3128", variable: listed}
    assert (proxy_of(ELSEWHERE, environment) is None) is direct


def test_networks_that_need_no_proxy() -> None:
    environment = {"https_proxy": "http://squid.example:3128", "no_proxy": "10.0.0.0/8,192.0.2.0/24"}
    assert proxy_of("192.0.2.7:5", environment) is None
    assert proxy_of("198.51.100.7:5", environment) is not None


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("http://squid.example:3128", "squid.example:3128"),
        ("squid.example:3128", "squid.example:3128"),
        ("http://squid.example", "squid.example:80"),
        ("http://user:secret@squid.example:1/", "squid.example:1"),
        ("http://[2001:db8::3]:3128", "[2001:db8::3]:3128"),
    ],
)
def test_how_a_proxy_may_be_written(value: str, shown: str) -> None:
    assert str(proxy_of(ELSEWHERE, {"HTTPS_PROXY": value})) == f"the proxy {shown} (HTTPS_PROXY)"


@pytest.mark.parametrize("value", ["", "socks5://squid.example:1080", "https://squid.example:1", "http://squid:port"])
def test_none_where_the_variable_names_no_proxy_that_is_spoken_to(value: str) -> None:
    """As gRPC has it."""
    assert proxy_of(ELSEWHERE, {"https_proxy": value, "http_proxy": "http://squid.example:3128"}) is None


def test_a_proxy_of_another_kind_is_told_where_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://ada:secret@squid.example:1080")
    assert proxy_note(ELSEWHERE) == "; ALL_PROXY names a proxy of another kind than http://, and none is used"
    assert proxy_note("127.0.0.1:5") == ""


def test_grpc_is_told_and_does_not_choose_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy_options(ELSEWHERE) == [("grpc.enable_http_proxy", 0)]
    monkeypatch.setenv("HTTPS_PROXY", "http://ada:secret@squid.example:3128")
    assert proxy_options(ELSEWHERE) == [("grpc.http_proxy", "http://ada:secret@squid.example:3128")]
    assert proxy_options("127.0.0.1:5") == [("grpc.enable_http_proxy", 0)]


def test_a_proxy_that_is_not_there_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        there = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("http_proxy", f"http://ada:secret@{there}")
        note = proxy_note(ELSEWHERE)
    assert note == f"; the proxy {there} (http_proxy) cannot be reached: Connection refused; mend or unset http_proxy"


@pytest.mark.parametrize("status", ["403 Forbidden", "407 Proxy Authentication Required", "405 Not allowed"])
def test_a_proxy_that_refuses_ends_the_wait_and_is_named(monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    proxy = ConnectProxy(status=status)
    monkeypatch.setenv("HTTPS_PROXY", proxy.address)
    try:
        with connect(ELSEWHERE, None) as channel, pytest.raises(WireError) as refused:
            await_ready(channel, ELSEWHERE, None, SECONDS)
        with pytest.raises(ProxyRefused):
            dial(ELSEWHERE, SECONDS)
    finally:
        proxy.stop()
    assert str(refused.value) == (
        f"{ELSEWHERE}: the proxy {proxy.address} (HTTPS_PROXY) answers '{status}'; have it let this machine through to "
        f"{ELSEWHERE}, or add body.example to no_proxy if it need not be asked"
    )


def test_a_proxy_that_does_not_reach_the_server_is_waited_for_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = ConnectProxy(status="503 Service Unavailable")
    monkeypatch.setenv("https_proxy", proxy.address)
    try:
        assert tls_fault(ELSEWHERE, None) is None
        assert "(https_proxy) answers '503 Service Unavailable': it does not reach the server" in proxy_note(ELSEWHERE)
    finally:
        proxy.stop()


def test_a_proxy_that_speaks_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("https_proxy", there)

        def answer() -> None:
            line, _ = listener.accept()
            line.recv(4096)
            line.sendall(b"220 mail.example ESMTP\r\n\r\n")
            line.close()

        threading.Thread(target=answer, daemon=True).start()
        assert (
            proxy_note(ELSEWHERE) == f"; the proxy {there} (https_proxy) does not speak HTTP; mend or unset https_proxy"
        )


def test_a_proxy_that_works_is_mentioned_where_nobody_answers(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    proxy = ConnectProxy(port)
    monkeypatch.setenv("https_proxy", proxy.address)
    try:
        assert proxy_note(ELSEWHERE) == f"; the proxy {proxy.address} (https_proxy) is on the way"
    finally:
        proxy.stop()
    assert proxy_note("127.0.0.1:5") == ""
