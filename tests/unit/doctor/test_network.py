"""Names, ports, proxies and what answers, on this machine's own sockets."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from fedbert_ds.doctor import network
from fedbert_ds.doctor.network import name_finding, port_finding, proxy_finding, reach_finding


@pytest.fixture
def listening() -> Iterator[int]:
    """A port of 127.0.0.1 that is in use."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed() -> Iterator[int]:
    """A port of 127.0.0.1 that is taken and not listened on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_a_name_that_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    assert name_finding("no..name", "--server", for_others=False).is_in_the_way
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    finding = name_finding("nowhere.example", "server.advertise", for_others=True)
    assert finding.is_in_the_way and "server.advertise" in finding.remedy


def test_a_name_that_is_this_machine_alone_is_told_where_others_dial_it() -> None:
    assert name_finding("127.0.0.1", "server.advertise", for_others=True).level == "warn"
    assert name_finding("127.0.0.1", "--server", for_others=False).level == "ok"
    assert name_finding("192.0.2.7", "server.advertise", for_others=True).level == "ok"


def test_a_port_in_use_and_a_free_one(listening: int) -> None:
    taken = port_finding("127.0.0.1", listening)
    assert taken.is_in_the_way and "in use" in taken.says and "server.port" in taken.remedy
    assert port_finding("0.0.0.0", listening).is_in_the_way
    assert port_finding("127.0.0.1", 0).level == "ok"


def test_a_free_port_is_free_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    # The port may be taken by others meanwhile, so the socket's own word counts.
    bound: list[object] = []
    monkeypatch.setattr(socket.socket, "bind", lambda _, address: bound.append(address))
    monkeypatch.setattr(socket.socket, "listen", lambda *_: None)
    assert port_finding("127.0.0.1", 29600).level == "ok" and bound == [("127.0.0.1", 29600)]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.EADDRNOTAVAIL, "an address of this machine"), (errno.EACCES, "above 1023"), (errno.EIO, "set another")],
)
def test_why_a_port_cannot_be_listened_on(monkeypatch: pytest.MonkeyPatch, code: int, remedy: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    finding = port_finding("127.0.0.1", 80)
    assert finding.is_in_the_way and remedy in finding.remedy


def test_a_host_that_is_none() -> None:
    assert port_finding("no..host", 29600).is_in_the_way


def test_proxies_are_told_and_their_passwords_are_not() -> None:
    variables = {"https_proxy": "http://me:secret@proxy.example:3128"}
    assert proxy_finding("192.0.2.1:29600", {}).line == "ok    proxy: no variable names one"
    finding = proxy_finding("192.0.2.1:29600", variables)
    assert finding.level == "warn" and "proxy.example:3128 (https_proxy)" in finding.line
    assert "secret" not in finding.line and "add 192.0.2.1 to no_proxy" in finding.line
    for address, more in (("127.0.0.1:1", {}), ("192.0.2.1:1", {"no_proxy": "192.0.2.1"}), (None, {})):
        apart = proxy_finding(address, variables | more)
        assert apart.level == "ok" and "https_proxy" in apart.line and "secret" not in apart.line


def test_what_answers_at_an_address(listening: int, closed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reach_finding(f"127.0.0.1:{listening}").level == "ok"
    refused = reach_finding(f"127.0.0.1:{closed}")
    assert refused.is_in_the_way and "nobody listens" in refused.says

    def silent(*_: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(network, "dial", silent)
    assert "firewalls" in reach_finding("192.0.2.1:29600").remedy


def test_a_proxy_that_is_gone_is_told_with_its_variable(closed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in network.VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed}")
    finding = reach_finding("192.0.2.1:29600")
    assert finding.is_in_the_way and "http_proxy" in finding.line
