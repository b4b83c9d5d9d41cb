"""The addresses that clients are told."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from fedbert_ds.certificates.authority import Authority
from fedbert_ds.config import RunConfig, ServerSection
from fedbert_ds.errors import ConfigError, WireError
from fedbert_ds.run_file import parse_config
from fedbert_ds.server.addresses import (
    advertised_host,
    check_advertised,
    check_certificate,
    check_plaintext,
    listening_port,
    local_host,
    nearest,
)


@pytest.fixture(autouse=True)
def one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_each_rank_has_a_port_or_a_free_one() -> None:
    assert [listening_port(ServerSection(port=29600), rank) for rank in range(3)] == [29600, 29601, 29602]
    assert [listening_port(ServerSection(port=0), rank) for rank in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("server", "world_size", "here", "expected"),
    [
        (ServerSection(), 2, None, "127.0.0.1"),
        (ServerSection(), 2, "2", "127.0.0.1"),
        (ServerSection(host="10.0.0.7"), 2, None, "10.0.0.7"),
        (ServerSection(host="0.0.0.0"), 2, None, socket.gethostname()),
        (ServerSection(host="::"), 2, None, socket.gethostname()),
        (ServerSection(host="[::]"), 2, None, socket.gethostname()),
        (ServerSection(host="::1"), 2, None, "::1"),
        (ServerSection(), 16, "8", socket.gethostname()),
        (ServerSection(advertise="body.example"), 16, "8", "body.example"),
    ],
)
def test_the_advertised_host(
    monkeypatch: pytest.MonkeyPatch, server: ServerSection, world_size: int, here: str | None, expected: str
) -> None:
    if here is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert advertised_host(server, world_size) == expected


def test_local_clients_do_not_dial_every_interface() -> None:
    assert local_host(ServerSection(host="0.0.0.0")) == "127.0.0.1"
    assert local_host(ServerSection(host="::")) == "127.0.0.1"
    assert local_host(ServerSection(host="10.0.0.7")) == "10.0.0.7"
    assert local_host(ServerSection(host="[::1]")) == "::1"


def test_clients_on_rank_0_s_node_dial_its_ranks_there_and_others_by_name() -> None:
    """The node's name may be unknown on the node itself."""
    told, here = ["gpu01:1", "gpu01:2", "gpu02:3"], ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]
    assert nearest(told, here, ["gpu01", "gpu01", "gpu02"]) == ["127.0.0.1:1", "127.0.0.1:2", "gpu02:3"]


@pytest.mark.parametrize("resolves", [True, False])
def test_a_name_that_the_machine_itself_does_not_know_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], resolves: bool
) -> None:
    def look_up(name: str, _: object) -> list[object]:
        if not resolves:
            raise socket.gaierror(name)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    remote = {"clients": {"local": 2, "expected": 3}}
    check_advertised(config_with(server={"host": "::"}, **remote))
    warned = capsys.readouterr().out
    assert (f"this machine's name, {socket.gethostname()}, which does not resolve" in warned) is not resolves
    # Nobody is told the name.
    check_advertised(config_with(server={"host": "0.0.0.0"}, clients={"local": 2, "expected": 2}))
    check_advertised(config_with(server={"host": "0.0.0.0", "advertise": "body.example"}, **remote))
    check_advertised(config_with(server={"host": "10.0.0.7"}, **remote))
    assert capsys.readouterr().out == ""


def config_with(**sections: object) -> RunConfig:
    return parse_config(dict(sections), "test")


ELSEWHERE = {"address": "sums.example:29700", "secret": "s"}
FILES = {"ca": "ca.pem", "certificate": "body.pem", "key": "body.key"}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"server": {"host": "::1"}},
        {"server": {"host": "0.0.0.0", "plaintext": True}},
        {"server": {"host": "0.0.0.0", "tls": FILES}},
        {"aggregator": {"address": "127.0.0.1:29700", "secret": "s"}},
        {"aggregator": ELSEWHERE | {"plaintext": True}},
        {"aggregator": ELSEWHERE, "server": {"tls": FILES}},
    ],
)
def test_plain_text_on_loopback_or_where_it_is_asked_for(sections: dict[str, object]) -> None:
    check_plaintext(config_with(**sections))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"server": {"host": "0.0.0.0"}}, r"server\.host: 0\.0\.0\.0 listens .* or server\.plaintext: true"),
        ({"server": {"host": "gpu01"}}, r"server\.host: gpu01 listens .* set server\.tls \(fedbert-ds certs"),
        ({"aggregator": ELSEWHERE}, r"aggregator\.address: sums\.example:29700 .* or aggregator\.plaintext: true"),
        (
            {"aggregator": ELSEWHERE, "server": {"host": "0.0.0.0", "plaintext": True}},
            r"aggregator\.address: sums\.example:29700 would be dialled in plain text, the secret and all",
        ),
    ],
)
def test_plain_text_that_nobody_asked_for_is_one_line(sections: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_plaintext(config_with(**sections))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path)
    made.create("an authority", 100)
    return made


def with_tls(certificate: Path, **sections: object) -> RunConfig:
    files = {"ca": certificate.with_name("ca.pem"), "certificate": certificate, "key": certificate.with_suffix(".key")}
    return config_with(server={"tls": {name: str(path) for name, path in files.items()}}, **sections)


def test_a_certificate_that_expires_soon_is_warned_of(authority: Authority, capsys: pytest.CaptureFixture[str]) -> None:
    check_certificate(with_tls(authority.issue("body", 90, hosts=[])))
    assert capsys.readouterr().out == ""
    check_certificate(with_tls(authority.issue("other", 5, hosts=[])))
    assert "other.pem expires in 5 days; renew it" in capsys.readouterr().out


def test_files_that_do_not_fit_are_told_before_work_starts(authority: Authority) -> None:
    certificate = authority.issue("body", 90, hosts=[])
    certificate.with_suffix(".key").write_text("no key")
    with pytest.raises(WireError, match=r"not PEM files"):
        check_certificate(with_tls(certificate))


def test_local_clients_cannot_show_an_aggregator_whose_they_are(authority: Authority) -> None:
    config = with_tls(authority.issue("body", 90, hosts=[]), aggregator=ELSEWHERE)
    with pytest.raises(ConfigError, match=r"clients\.local: 4: local clients have no certificates of their own"):
        check_certificate(config)
    check_certificate(with_tls(authority.folder / "body.pem", aggregator=ELSEWHERE, clients={"local": 0}))
