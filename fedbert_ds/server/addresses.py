"""The addresses at which clients find a rank."""

from __future__ import annotations

import os
import socket

from fedbert_ds.config import ServerSection


def listening_port(server: ServerSection, rank: int) -> int:
    """The port a rank listens on; 0 takes a free one."""
    return server.port and server.port + rank


def advertised_host(server: ServerSection, world_size: int) -> str:
    """The host that clients are told for this rank's endpoint."""
    if server.advertise:
        return server.advertise
    on_several_nodes = world_size > int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size)))
    if on_several_nodes or server.host == "0.0.0.0":
        return socket.gethostname()
    return server.host


def local_host(server: ServerSection) -> str:
    """The host at which processes of this machine reach the endpoint."""
    return "127.0.0.1" if server.host == "0.0.0.0" else server.host
