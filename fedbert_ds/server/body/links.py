"""Checks, before ranks of several nodes meet, that they can: names, addresses, the first port."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Mapping, Sequence

from fedbert_ds.errors import ConfigError

MEETING_SECONDS = 300.0
"""How long a rank looks for rank 0, which may start later."""

NAMES = "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"


def check_links(environment: Mapping[str, str], patience: float = MEETING_SECONDS) -> None:
    """Raise ConfigError, in one line, if this rank's node cannot meet the others'.

    Within one node there is nothing to check. Without it a rank would wait for PATIENCE.
    """
    if int(environment["WORLD_SIZE"]) <= ranks_on_node(environment):
        return
    host, port, rank = environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), environment["RANK"]
    here, interface = socket.gethostname(), environment.get("GLOO_SOCKET_IFNAME")
    is_elsewhere = int(rank) >= ranks_on_node(environment)
    if wrong := problem_of_names(host, addresses(host), is_elsewhere, here, addresses(here), interface):
        raise ConfigError(f"rank {rank} on {here}: {wrong}")
    if rank != "0" and not answers(host, port, patience):
        raise ConfigError(
            f"rank {rank} on {here}: rank 0 does not answer at {host}:{port} (MASTER_ADDR, MASTER_PORT) within "
            f"{patience:.0f} s; check that it has started, and that this port and those above 1024 are open "
            "between the nodes"
        )


def ranks_on_node(environment: Mapping[str, str]) -> int:
    """Ranks that share this node, as torchrun or deepspeed tells; all of them where none does."""
    told = (environment.get(name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"))
    return next((int(number) for number in told if number), 1)


def problem_of_names(
    meeting_host: str,
    meeting_addresses: Sequence[str],
    is_elsewhere: bool,
    here: str,
    own_addresses: Sequence[str],
    interface: str | None,
) -> str | None:
    """What is wrong with the names, if anything is.

    `is_elsewhere` says that rank 0 is on another node. `here` is this node's name, as gloo looks it
    up; `interface` tells gloo where to listen instead.
    """
    if not meeting_addresses:
        return f"MASTER_ADDR is {meeting_host}, which this node cannot look up; give it an address or a name it knows"
    if is_elsewhere and all(map(is_loopback, meeting_addresses)):
        return (
            f"MASTER_ADDR is {meeting_host}, which is {meeting_addresses[0]} here, this node itself; give rank 0's "
            "address on the network between the nodes"
        )
    if interface:
        return None
    if not own_addresses:
        return f"this node cannot look up its own name, {here}; add it to /etc/hosts, or set {NAMES}"
    if all(map(is_loopback, own_addresses)):
        return (
            f"this node's name, {here}, is {own_addresses[0]}, which other nodes cannot reach; set {NAMES} to the "
            "interface between the nodes (see: ip -brief address), or mend /etc/hosts"
        )
    return None


def addresses(host: str) -> list[str]:
    """The host's IP addresses; none if it cannot be looked up."""
    try:
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except OSError:
        return []


def answers(host: str, port: int, patience: float) -> bool:
    """Whether something listens there within `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=5.0).close()
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(min(1.0, patience / 10))


def is_loopback(address: str) -> bool:
    """Whether an IP address, perhaps with an interface behind %, is this machine's own."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
