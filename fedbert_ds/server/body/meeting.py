"""Where the ranks of one machine meet: at its loopback address, out of every stranger's reach."""

from __future__ import annotations

import socket
from collections.abc import Mapping, MutableMapping
from typing import Any

import psutil

from fedbert_ds.errors import ConfigError
from fedbert_ds.server.body.links import addresses, is_loopback, ranks_on_node

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
AGENT = "TORCHELASTIC_USE_AGENT_STORE"
"""Set where another process has the store, as torchrun's agent: then every rank is its client."""


def stay_on_this_machine(environment: MutableMapping[str, str]) -> Any:
    """Let ranks that meet at a loopback address listen nowhere else; rank 0's store, to be kept
    until the end.

    Does nothing where the machine is one of several, or a user has said where to listen. torchrun's
    agent listens where it likes. Raises ConfigError, in one line, for a port that is in use.
    """
    if not meets_at_home(environment):
        return None
    if (name := _loopback_interface()) is not None:
        for variable in INTERFACES:
            environment.setdefault(variable, name)
    if environment.get(AGENT) == "True":
        return None
    environment[AGENT] = "True"
    return _store(environment) if environment["RANK"] == "0" else None


def restart_store(environment: Mapping[str, str]) -> Any:
    """A part of torchrun's store for ranks that it has started again; None where it has not.

    The store outlives them, with the addresses of the ranks there were before (pytorch issue
    135712). One agent's count of restarts parts them. Agents of several nodes count apart.
    """
    count = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    is_alone = int(environment["WORLD_SIZE"]) <= ranks_on_node(environment)
    if count == "0" or environment.get(AGENT) != "True" or not is_alone:
        return None
    import torch.distributed as dist

    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
    return dist.PrefixStore(f"fedbert/start/{count}", store)


def meets_at_home(environment: Mapping[str, str]) -> bool:
    """Whether MASTER_ADDR is this machine for every rank."""
    found = addresses(environment["MASTER_ADDR"])
    return bool(found) and all(map(is_loopback, found))


def _store(environment: MutableMapping[str, str]) -> Any:
    import torch.distributed as dist

    host, port = "127.0.0.1", int(environment["MASTER_PORT"])
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"port {port} of {host}, where ranks meet, cannot be taken ({error.strerror}); give another MASTER_PORT "
            "(deepspeed: --master_port)"
        ) from error
    listener.listen(1024)
    port = listener.getsockname()[1]
    environment["MASTER_PORT"] = str(port)  # one rank alone may leave the choice to the system
    # torch closes the descriptor with the store.
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _loopback_interface() -> str | None:
    """Its name here: `lo`, or as this system has it."""
    for name, found in psutil.net_if_addrs().items():
        if any(one.family == socket.AF_INET and one.address == "127.0.0.1" for one in found):
            return name
    return None
