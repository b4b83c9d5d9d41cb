"""gRPC channels and servers: options, mutual TLS and keepalive in one place."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from typing import Any

import grpc

from fedbert_ds.errors import WireError
from fedbert_ds.wire.http_proxy import proxy_options
from fedbert_ds.wire.tls import TlsFiles, tls_fault

MAX_MESSAGE_BYTES = 256 << 20
"""Above the largest piece of a micro-batch; client updates travel in chunks of 1 MB."""

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Either side notices a dead link: 20 s after TCP stops acknowledging; an idle link is pinged
    # every 30 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A ping's answer waits behind some 2 MB in the buffers of a slow link. With gRPC's default of a
    # minute a connection of 0.3 Mbit/s counts as dead before a message of 3 MB is through.
    ("grpc.http2.ping_timeout_ms", 150_000),
    ("grpc.http2.settings_timeout", 150_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    # By default gRPC hangs up after some minutes of keepalive without messages.
    ("grpc.http2.max_ping_strikes", 0),
    # A second server on the same port must fail.
    ("grpc.so_reuseport", 0),
]


CLIENT_OPTIONS: list[tuple[str, Any]] = [
    *OPTIONS,
    # ServerStream waits itself before it dials again: channels share no connection, no backoff.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
]

JOIN = "/fedbert.Federation/Join"
TRAIN = "/fedbert.Federation/Train"
"""The calls of the service. Train carries bytes: messages are kept serialized, to be sent again."""

OPEN = "/fedbert.Aggregation/Open"
CONDUCT = "/fedbert.Aggregation/Conduct"
"""The ranks' calls at an aggregator of another party; Conduct carries bytes, as Train."""


def server_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """Server credentials; every client needs a certificate of the same authority."""
    ca, certificate, key = tls.read()
    return grpc.ssl_server_credentials([(key, certificate)], root_certificates=ca, require_client_auth=True)


def connect(address: str, tls: TlsFiles | None) -> grpc.Channel:
    """A channel to host:port, encrypted if TLS files are given; through the environment's proxy,
    unless the address is this machine's.
    """
    options = CLIENT_OPTIONS + proxy_options(address)
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    ca, certificate, key = tls.read()
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate), options=options)


FIRST_LOOK_SECONDS = 1.0
"""After so long without a connection TLS is looked at, and then after twice as long each time."""


ASK_SECONDS = 0.2
"""Between two questions whether dialling has become vain."""


def await_ready(
    channel: grpc.Channel,
    address: str,
    tls: TlsFiles | None,
    seconds: float,
    is_vain: Callable[[], bool] = lambda: False,
) -> None:
    """Wait until the channel is connected; grpc.FutureTimeoutError after `seconds`, or as soon as
    `is_vain` says that nobody is awaited at this address any longer.

    Raises WireError, with what is wrong, where TLS or a proxy keeps the two sides apart: waiting
    changes nothing about it.
    """
    ready, deadline, look = grpc.channel_ready_future(channel), time.monotonic() + seconds, FIRST_LOOK_SECONDS
    look_at = time.monotonic() + look
    while True:
        until = min(deadline, look_at)
        try:
            ready.result(timeout=max(0.0, min(until - time.monotonic(), ASK_SECONDS)))
            return
        except grpc.FutureTimeoutError:
            if is_vain():
                raise
            if time.monotonic() < until:
                continue
            if (fault := tls_fault(address, tls)) is not None:
                raise WireError(f"{address}: {fault}") from None
            if until == deadline:
                raise
        look *= 2
        look_at = time.monotonic() + look


def is_loopback(host: str) -> bool:
    """Whether nothing that is sent to this host, or to host:port, leaves the machine."""
    name = host.rpartition(":")[0] if host.count(":") == 1 or "]:" in host else host
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name == "localhost"
