"""The addresses at which clients find a rank."""

from __future__ import annotations

import os
import socket

from fedbert_ds.config import ServerSection
from fedbert_ds.server.body.links import ranks_on_node


def listening_port(server: ServerSection, rank: int) -> int:
    """The port that a rank listens on: `server.port` + rank, or 0 for a free one."""
    return server.port and server.port + rank


def advertised_host(server: ServerSection, world_size: int) -> str:
    """The host of this rank's endpoint, as clients outside reach it.

    `server.advertise`, or this node's name on several nodes and behind 0.0.0.0, or `server.host`.
    """
    if server.advertise:
        return server.advertise
    on_several_nodes = world_size > ranks_on_node({"WORLD_SIZE": str(world_size), **os.environ})
    if on_several_nodes or server.host == "0.0.0.0":
        return socket.gethostname()
    return server.host


def local_host(server: ServerSection) -> str:
    """The host of the endpoint, as processes on this machine reach it."""
    return "127.0.0.1" if server.host == "0.0.0.0" else server.host
