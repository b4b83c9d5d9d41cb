"""What a rank takes on its machine: where it listens, and where its network runs."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from unit.server.fakes import FakeRankGroup

from fedbert_ds.certificates.authority import Authority
from fedbert_ds.config import RunConfig
from fedbert_ds.errors import UserError
from fedbert_ds.run_file import parse_config
from fedbert_ds.server.here import build_endpoint, listen
from fedbert_ds.server.network.endpoint import Endpoint
from fedbert_ds.server.network.endpoint_process import EndpointProcess
from fedbert_ds.server.run_folder import RunFolder


def config_with(folder: Path, **sections: Any) -> RunConfig:
    return parse_config({"run": {"directory": str(folder)}, **sections}, "test")


def test_a_rank_listens_until_the_end(tmp_path: Path) -> None:
    config = config_with(tmp_path / "run", server={"port": 0}, clients={"expected": 2, "local": 2})
    with ExitStack() as at_end:
        here = listen(config, FakeRankGroup(), RunFolder(config.run.directory), at_end)  # type: ignore[arg-type]
        assert here.addresses == here.local_addresses and len(here.nodes) == 1
        host, port = here.addresses[0].split(":")
        socket.create_connection((host, int(port)), timeout=10).close()
        assert len(here.tokens) == 2 and len(set(here.tokens.values())) == 2
    with pytest.raises(OSError):
        socket.create_connection((host, int(port)), timeout=10)


def test_a_certificate_for_another_name_stops_the_start(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.create("an authority", 100)
    authority.issue("body", 90, hosts=["body.example"])
    files = {"ca": tmp_path / "ca.pem", "certificate": tmp_path / "body.pem", "key": tmp_path / "body.key"}
    server = {"port": 0, "host": "0.0.0.0", "advertise": "other.example", "tls": {k: str(v) for k, v in files.items()}}
    config = config_with(tmp_path / "run", server=server, clients={"expected": 1, "local": 0})
    with ExitStack() as at_end, pytest.raises(UserError, match=r"other\.example"):
        listen(config, FakeRankGroup(), RunFolder(config.run.directory), at_end)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("network", "has_gpu", "kind"),
    [
        ("auto", False, Endpoint),
        ("auto", True, EndpointProcess),
        ("thread", True, Endpoint),
        ("process", False, EndpointProcess),
    ],
)
def test_the_network_has_a_process_of_its_own_beside_a_gpu(
    monkeypatch: pytest.MonkeyPatch, network: str, has_gpu: bool, kind: type
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    config = config_with(Path("run"), server={"network": network, "port": 0})
    assert type(build_endpoint(config.server, config.clients, rank=0, tokens={})) is kind
