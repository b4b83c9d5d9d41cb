"""Ranks of one machine listen at its loopback address alone; several machines are left alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from fedbert_ds.errors import ConfigError
from fedbert_ds.server.body import meeting
from fedbert_ds.server.body.meeting import AGENT, INTERFACES, meets_at_home, restart_store, stay_on_this_machine

RANK = """
import os, sys, time
import psutil, torch, torch.distributed as dist
from fedbert_ds.server.body.distributed import initialize, shut_down
from fedbert_ds.server.rank_group import RankGroup
from fedbert_ds.server.rank_messages import RankSecret
from pathlib import Path

initialize()
group = RankGroup(RankSecret(Path(sys.argv[1])))
total = torch.ones(1)
dist.all_reduce(total)
listening = {one.laddr.ip for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN}
print(int(total), sorted(listening), flush=True)
group.barrier()
shut_down()
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ranks(folder: Path, address: str) -> list[str]:
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": free_port(), "DS_ACCELERATOR": "cpu"}
    variables |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    hidden = (*INTERFACES, AGENT, "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | variables
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder / "run")],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    return [output.splitlines()[-1] for output, _ in ended]


def test_ranks_of_one_machine_listen_nowhere_else(tmp_path: Path) -> None:
    """torch's own store listened on every interface."""
    assert ranks(tmp_path, "127.0.0.1") == ["2 ['127.0.0.1']"] * 2


def test_a_port_that_is_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with pytest.raises(ConfigError, match=rf"port {port} of 127\.0\.0\.1, where ranks meet, cannot be taken \("):
            stay_on_this_machine(environment)


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "127.0.1.1"])
def test_the_others_are_clients_of_rank_0(address: str) -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": "1"}
    assert stay_on_this_machine(environment) is None
    name = environment[INTERFACES[0]]
    assert environment[AGENT] == "True" and environment[INTERFACES[1]] == name
    assert any(one.address == "127.0.0.1" for one in psutil.net_if_addrs()[name])


def test_torchrun_s_agent_keeps_its_store_and_a_user_s_interface_stays() -> None:
    environment = {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", AGENT: "True", INTERFACES[0]: "eth7"}
    assert stay_on_this_machine(environment) is None
    assert environment[INTERFACES[0]] == "eth7" and environment[AGENT] == "True"


def test_several_machines_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"gpu1": ["10.0.0.1"], "me": ["127.0.1.1", "10.0.0.1"]}
    monkeypatch.setattr(meeting, "addresses", found.__getitem__)
    for host in ("gpu1", "me"):
        environment = {"RANK": "0", "MASTER_ADDR": host, "MASTER_PORT": "1"}
        before = dict(environment)
        assert not meets_at_home(environment)
        assert stay_on_this_machine(environment) is None and environment == before


def test_ranks_that_torchrun_starts_again_see_nothing_of_the_last_ones() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("address", "of a rank that is gone")
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", AGENT: "True"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for count in ("1", "2"):
        again = restart_store(environment | {"TORCHELASTIC_RESTART_COUNT": count})
        assert not again.check(["address"])
        again.set("address", "new")
    assert store.get("address") == b"of a rank that is gone"


@pytest.mark.parametrize(
    "changed",
    [{"TORCHELASTIC_RESTART_COUNT": "0"}, {AGENT: "False"}, {"LOCAL_WORLD_SIZE": "1"}],
    ids=["first start", "no store of torchrun's", "several nodes, whose agents count apart"],
)
def test_all_other_ranks_meet_as_torch_has_it(changed: dict[str, str]) -> None:
    environment = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", AGENT: "True", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert restart_store(environment | changed) is None
