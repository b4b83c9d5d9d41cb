"""Ranks on several nodes that cannot meet say so in one line, before they wait for each other."""

from __future__ import annotations

import socket

import pytest

from fedbert_ds.errors import ConfigError
from fedbert_ds.server.body import links
from fedbert_ds.server.body.links import answers, check_links, problem_of_names, ranks_on_node

GPU_1, GPU_2, LOOPBACK = ["10.0.0.1"], ["10.0.0.2"], ["127.0.1.1"]
TWO_NODES = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "RANK": "1", "MASTER_ADDR": "gpu1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("meeting", "own", "interface", "words"),
    [
        (GPU_1, GPU_2, None, None),
        (["10.0.0.1", "::1"], GPU_2, None, None),
        (GPU_1, LOOPBACK, "eth1", None),
        (GPU_1, [], "eth1", None),
        ([], GPU_2, None, "MASTER_ADDR is gpu1, which this node cannot look up"),
        (["127.0.0.1"], GPU_2, "eth1", "MASTER_ADDR is gpu1, which is 127.0.0.1 here, this node itself"),
        (GPU_1, LOOPBACK, None, "name, gpu2, is 127.0.1.1, which other nodes cannot reach; set GLOO_SOCKET_IFNAME and"),
        (GPU_1, ["::1"], "", "name, gpu2, is ::1, which other nodes cannot reach"),
        (GPU_1, [], None, "cannot look up its own name, gpu2; add it to /etc/hosts"),
    ],
)
def test_names(meeting: list[str], own: list[str], interface: str | None, words: str | None) -> None:
    problem = problem_of_names("gpu1", meeting, True, "gpu2", own, interface)
    assert problem is None if words is None else problem is not None and words in problem


def test_on_its_own_node_rank_0_may_be_met_at_a_loopback_address() -> None:
    """Debian gives a host's own name one, so gloo needs to be told of the interface."""
    assert problem_of_names("gpu1", LOOPBACK, False, "gpu1", LOOPBACK, "eth1") is None
    problem = problem_of_names("gpu1", LOOPBACK, False, "gpu1", LOOPBACK, None)
    assert problem is not None and "GLOO_SOCKET_IFNAME" in problem


def test_ranks_of_one_node_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "addresses", lambda host: [])
    check_links(TWO_NODES | {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "nowhere"})
    check_links({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"})


def test_the_rank_and_its_node_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "addresses", lambda host: GPU_1 if host == "gpu1" else LOOPBACK)
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu2")
    with pytest.raises(ConfigError, match=r"^rank 1 on gpu2: this node's name, gpu2, is 127\.0\.1\.1"):
        check_links(TWO_NODES)


def test_a_port_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "addresses", lambda host: GPU_1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
        here = TWO_NODES | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with pytest.raises(ConfigError, match=rf"rank 0 does not answer at 127\.0\.0\.1:{port} .*within 0 s; check"):
            check_links(here, patience=0.1)
        check_links(here | {"RANK": "0"}, patience=0.1)
        listener.listen()
        check_links(here, patience=0.1)
        assert answers("127.0.0.1", int(port), 0.1)


def test_a_name_that_is_unknown_has_no_addresses() -> None:
    assert links.addresses("no-such-host.invalid") == []
    assert "127.0.0.1" in links.addresses("127.0.0.1")


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "4"}, 4),
        ({"WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, 2),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "1", "LOCAL_SIZE": "2"}, 1),
    ],
    ids=["no launcher", "one node", "deepspeed", "torchrun"],
)
def test_every_launcher_says_how_many_ranks_share_a_node(environment: dict[str, str], number: int) -> None:
    assert ranks_on_node(environment) == number
