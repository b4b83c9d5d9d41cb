"""What strangers and clients may take of an endpoint's machine: descriptors, seconds, memory.

Nobody sets these. Strangers that reach them are turned away, and clients do not notice.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping
from typing import Any

from fedbert_ds.wire.channel import OPTIONS

MOST_DESCRIPTORS = 1 << 16
"""Asked of the system; a machine may allow fewer."""

MOST_CONNECTIONS = 10_000
"""A client has one, and a second one while it joins."""

HANDSHAKE_SECONDS = 20.0
"""A connection that has not agreed on TLS and HTTP/2 by then is closed."""

IDLE_SECONDS = 60.0
"""A connection without a call is closed after that."""

MOST_STREAMS = 4
"""Calls of one connection at a time; a client makes one. One that is refused counts until Python
collects its garbage.
"""

MOST_METADATA_BYTES = 16 << 10
"""Of a call: all that is read of a caller before it is known."""

CALLS_AT_ONCE = 1000.0
"""Joins and refused calls from one address before its rate counts: all clients of a machine may
come together.
"""

CALLS_PER_SECOND = 10.0
"""Joins and refused calls from one address, once these are used up."""

TURN_AWAY_SECONDS = 1.0
"""Until a call beyond the rate is answered. A caller has few calls at a time, so it slows down."""

UPDATES_KEPT = 8
"""Client updates that may wait for one client; the reference with its moments is as large as three.
"""

KEPT_ANYWAY_BYTES = 256 << 20
"""May wait for a client beside that: with a small model many windows pass while it is late."""


def raise_descriptor_limit() -> int:
    """Allow this process as many descriptors as it may have; returns how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def most_connections(descriptors: int) -> int:
    """How many connections a process with so many descriptors takes: the rest is for its files."""
    return max(1, min(MOST_CONNECTIONS, descriptors // 2))


def server_options(descriptors: int) -> list[tuple[str, Any]]:
    """The gRPC options of a listening process with so many descriptors."""
    return [
        *OPTIONS,
        ("grpc.max_allowed_incoming_connections", most_connections(descriptors)),
        ("grpc.server_handshake_timeout_ms", round(1000 * HANDSHAKE_SECONDS)),
        ("grpc.max_connection_idle_ms", round(1000 * IDLE_SECONDS)),
        ("grpc.max_concurrent_streams", MOST_STREAMS),
        ("grpc.max_metadata_size", MOST_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", 2 * MOST_METADATA_BYTES),
    ]


def most_kept(client_model: Mapping[str, tuple[int, ...]], window_bytes: float = 0.0) -> int:
    """Bytes that a client may leave unread: its half has tensors of these shapes, and its part of a
    window comes back in `window_bytes`.
    """
    update_bytes = sum(4 * math.prod(shape) for shape in client_model.values())
    return round(UPDATES_KEPT * update_bytes + 2 * window_bytes + KEPT_ANYWAY_BYTES)
