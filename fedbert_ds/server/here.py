"""What a rank has on its machine: cores, a port, the clients that it starts."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from fedbert_ds.config import ClientsSection, RunConfig, ServerSection
from fedbert_ds.server.addresses import advertised_host, listening_port, local_host, tls_of
from fedbert_ds.server.body.cores import Place, allowed_cores, bind, codec_threads, place_of, share_of, threads_for
from fedbert_ds.server.local_clients import LocalClients, new_tokens
from fedbert_ds.server.network.door import DoorRules
from fedbert_ds.server.network.endpoint import Endpoint
from fedbert_ds.server.network.endpoint_process import EndpointProcess
from fedbert_ds.server.network.events import RankEndpoint
from fedbert_ds.server.rank_group import RankGroup
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.telemetry.trace import Trace
from fedbert_ds.wire.host_port import host_port


@dataclass(frozen=True)
class Here:
    """What this rank has on its machine."""

    cores: frozenset[int]
    """Those that it is bound to; none where it may use all."""
    codec_threads: int
    trace: Trace
    endpoint: RankEndpoint
    clients: LocalClients
    tokens: Mapping[str, str]
    """Of local clients."""
    nodes: list[str]
    addresses: list[str]
    local_addresses: list[str]
    """Of every rank, like its node; for clients anywhere and for those of its machine."""


def listen(config: RunConfig, ranks: RankGroup, folder: RunFolder, at_end: ExitStack) -> Here:
    """Take this rank's cores and port, and tell the other ranks of it."""
    launched_on = allowed_cores()
    has_gpu = torch.cuda.is_available()
    places = ranks.gather(place_of(socket.gethostname(), torch.cuda.current_device() if has_gpu else None), Place)
    cores = _bind(share_of(ranks.rank, places)) if has_gpu else frozenset()
    devices, tls = _client_devices(config.clients.local_device), tls_of(config.server.tls)
    tokens = ranks.broadcast(new_tokens(config.clients.local) if ranks.rank == 0 else None, dict[str, str])
    clients = LocalClients(
        folder, devices, launched_on, config.task.name, tls=tls, tokens=tokens, cache=config.data.cache
    )
    endpoint = build_endpoint(config.server, config.clients, ranks.rank, tokens)
    trace = Trace(folder.trace(ranks.rank) if config.run.trace else None, ranks.rank)
    at_end.callback(trace.close)
    at_end.callback(clients.stop)
    at_end.callback(endpoint.stop)
    port = endpoint.start()
    host = advertised_host(config.server, ranks.world_size)
    if tls is not None:
        tls.check_host(host)
    return Here(
        cores=cores,
        codec_threads=codec_threads(ranks.rank, places),
        trace=trace,
        endpoint=endpoint,
        clients=clients,
        tokens=tokens,
        nodes=[place.node for place in places],
        addresses=ranks.gather(host_port(host, port), str),
        local_addresses=ranks.gather(host_port(local_host(config.server), port), str),
    )


def build_endpoint(
    server: ServerSection, clients: ClientsSection, rank: int, tokens: Mapping[str, str]
) -> RankEndpoint:
    """A rank's endpoint, not yet listening. `auto` takes a process of its own beside a GPU, and
    with TLS, where strangers may come.
    """
    # By `fedbert-ds bench network`, a process of its own pays where the body leaves cores idle.
    in_process = server.network == "process" or (
        server.network == "auto" and (torch.cuda.is_available() or server.tls is not None)
    )
    rules = DoorRules(clients.allowed, server.tls.revoked if server.tls else None, tokens)
    kind = EndpointProcess if in_process else Endpoint
    port = listening_port(server, rank)
    return kind(server.host, port, tls_of(server.tls), clients.reconnect_timeout, server.shared_memory, rules)


def _bind(cores: frozenset[int]) -> frozenset[int]:
    """Bind this rank to these cores, if the system tells of any; returns them."""
    if cores:
        bind(cores)
    if (threads := threads_for(cores, os.environ)) is not None:
        torch.set_num_threads(threads)
    return cores


def _client_devices(choice: str) -> list[str]:
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] if choice == "cuda" else ["cpu"]
