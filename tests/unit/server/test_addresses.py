"""The addresses that clients are told."""

from __future__ import annotations

import socket

import pytest

from fedbert_ds.config import ServerSection
from fedbert_ds.server.addresses import advertised_host, listening_port, local_host


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
    assert local_host(ServerSection(host="10.0.0.7")) == "10.0.0.7"
