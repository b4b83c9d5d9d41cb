"""The addresses at which clients find a rank."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from fedbert_ds.config import RunConfig, ServerSection, TlsSection
from fedbert_ds.errors import ConfigError, warn
from fedbert_ds.server.body.links import ranks_on_node
from fedbert_ds.wire.channel import is_loopback
from fedbert_ds.wire.host_port import is_every_interface
from fedbert_ds.wire.tls import TlsFiles, expiry_warning


def listening_port(server: ServerSection, rank: int) -> int:
    """The port that a rank listens on: `server.port` + rank, or 0 for a free one."""
    return server.port and server.port + rank


def advertised_host(server: ServerSection, world_size: int) -> str:
    """The host of this rank's endpoint, as clients outside reach it.

    `server.advertise`, or this node's name on several nodes and behind 0.0.0.0 or ::, or
    `server.host`.
    """
    if server.advertise:
        return server.advertise
    on_several_nodes = world_size > ranks_on_node({"WORLD_SIZE": str(world_size), **os.environ})
    if on_several_nodes or is_every_interface(server.host):
        return socket.gethostname()
    return server.host


def local_host(server: ServerSection) -> str:
    """The host of the endpoint, as processes on this machine reach it."""
    # gRPC listens on both families behind 0.0.0.0 and behind ::, where the machine has both.
    return "127.0.0.1" if is_every_interface(server.host) else server.host


def nearest(addresses: Sequence[str], local_addresses: Sequence[str], nodes: Sequence[str]) -> list[str]:
    """Each rank's address for clients on rank 0's node, whose name may be unknown to itself.

    All lists are by rank; `nodes` are names.
    """
    return [
        here if node == nodes[0] else there for there, here, node in zip(addresses, local_addresses, nodes, strict=True)
    ]


def check_advertised(config: RunConfig) -> None:
    """Warn where remote clients are told a name that this machine itself does not know."""
    server, name = config.server, socket.gethostname()
    is_told = server.advertise is None and is_every_interface(server.host)
    if not is_told or config.clients.expected <= config.clients.local:
        return
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        warn(
            f"server.host: {server.host} tells remote clients this machine's name, {name}, which does not resolve "
            "here; set server.advertise to a name or an address that they reach"
        )


def tls_of(section: TlsSection | None) -> TlsFiles | None:
    """The files of mutual TLS that ranks show to clients, and to an aggregator of another party."""
    return TlsFiles(section.ca, section.certificate, section.key) if section else None


def check_plaintext(config: RunConfig) -> None:
    """ConfigError for a server that would speak plain text beyond this machine without being told
    so.
    """
    server, aggregator = config.server, config.aggregator
    if server.tls is not None:
        return
    if not (is_loopback(server.host) or server.plaintext):
        raise ConfigError(
            f"server.host: {server.host} listens beyond this machine, in plain text: anybody on the way could read "
            "activations or take a client's place; set server.tls (fedbert-ds certs makes its files), or "
            "server.plaintext: true"
        )
    if aggregator is not None and not (is_loopback(aggregator.address) or aggregator.plaintext):
        raise ConfigError(
            f"aggregator.address: {aggregator.address} would be dialled in plain text, the secret and all; set "
            "server.tls (fedbert-ds certs makes its files), or aggregator.plaintext: true"
        )


def check_certificate(config: RunConfig) -> None:
    """Warn of a certificate that expires soon. WireError for files of TLS that do not fit,
    ConfigError for local clients that could not show theirs.
    """
    if (tls := tls_of(config.server.tls)) is None:
        return
    tls.read()
    if (warning := expiry_warning(tls)) is not None:
        warn(warning)
    if config.clients.local:
        if config.aggregator is not None:
            raise ConfigError(
                f"clients.local: {config.clients.local}: local clients have no certificates of their own, which the "
                "aggregator wants to see; set clients.local: 0 and start them with fedbert-ds client"
            )
        tls.check_host(local_host(config.server))
