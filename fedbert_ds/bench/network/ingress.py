"""What an endpoint accepts over loopback, and what that costs in processor time."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from typing import Any

from fedbert_ds.bench.network.endpoint import ClientProcess, Load, MeasuredEndpoint

MESSAGE_BYTES = (64 << 10, 1 << 20, 4 << 20)
STREAMS = (1, 4, 16)
TRANSPORTS = ("socket", "shared")
PLACES = ("thread", "process")
"""Of the network: a thread of the body's process, or a process of its own."""
Row = dict[str, Any]
ROW_BYTES = 400_000_000
QUICK_ROW_BYTES = 20_000_000


def ingress_rows(is_quick: bool) -> Iterator[Row]:
    """Rows of rates, then rows beside a busy body."""
    num_bytes = QUICK_ROW_BYTES if is_quick else ROW_BYTES
    yield from rate_rows(num_bytes)
    yield from busy_rows(num_bytes)


def busy_rows(num_bytes: int) -> Iterator[Row]:
    """Time that a body launching small operations is blocked by the network, busy both ways."""
    for place in PLACES:
        names = tuple(f"client-{number}" for number in range(4))
        with (
            MeasuredEndpoint(names, answer_bytes=1 << 20, in_process=place == "process", busy=True) as endpoint,
            ClientProcess() as clients,
        ):
            messages = max(1, num_bytes // len(names) >> 20)
            before = endpoint.usage()
            started = time.monotonic()
            clients.run(Load(endpoint.address, names, message_bytes=1 << 20, messages=messages))
            wrong = clients.result().wrong
            seconds = time.monotonic() - started
            after = endpoint.usage()
            moved = 2 * (after.num_bytes - before.num_bytes) / 1e9
            blocked = after.blocked_seconds - before.blocked_seconds
            yield {
                "what": "busy",
                "ingress": place,
                "transport": "socket",
                "gb": round(moved, 4),
                "seconds": round(seconds, 3),
                "gb_per_second": round(moved / seconds, 3),
                "blocked_share": round(blocked / (after.body_seconds - before.body_seconds), 4),
                "blocked_seconds_per_gb": round(blocked / moved, 3),
                "wrong": after.wrong + wrong,
                "load": round(os.getloadavg()[0], 1),
            }


def rate_rows(num_bytes: int) -> Iterator[Row]:
    """Rows by place, direction, message size, transport and streams; each moves `num_bytes`."""
    runs = [
        (transport, tuple(f"client-{transport}-{streams}-{number}" for number in range(streams)))
        for transport, streams in itertools.product(TRANSPORTS, STREAMS)
    ]
    everybody = tuple(name for _, names in runs for name in names)
    with ClientProcess() as clients:
        for place, is_answered, message_bytes in itertools.product(PLACES, (False, True), MESSAGE_BYTES):
            answer_bytes = message_bytes if is_answered else 0
            with MeasuredEndpoint(everybody, answer_bytes=answer_bytes, in_process=place == "process") as endpoint:
                for transport, names in runs:
                    messages = max(1, num_bytes // message_bytes // len(names))
                    load = Load(endpoint.address, names, message_bytes, messages, shares_memory=transport == "shared")
                    facts = {"what": "rate", "ingress": place, "transport": transport, "answered": is_answered}
                    facts |= {"message_bytes": message_bytes, "streams": len(names)}
                    yield facts | _rates(endpoint, clients, load, directions=1 + is_answered)


def _rates(endpoint: MeasuredEndpoint, clients: ClientProcess, load: Load, directions: int) -> Row:
    before = endpoint.usage()
    started = time.monotonic()
    clients.run(load)
    used = clients.result()
    seconds = time.monotonic() - started
    after = endpoint.usage()
    moved = (after.num_bytes - before.num_bytes) * directions / 1e9
    body = after.cpu_seconds - before.cpu_seconds
    return {
        "gb": round(moved, 4),
        "seconds": round(seconds, 3),
        "gb_per_second": round(moved / seconds, 3),
        "server_cpu_seconds_per_gb": round((body + after.child_seconds - before.child_seconds) / moved, 3),
        "body_cpu_seconds_per_gb": round(body / moved, 3),
        "body_python_seconds_per_gb": round((after.python_seconds - before.python_seconds) / moved, 3),
        "client_cpu_seconds_per_gb": round(used.cpu_seconds / moved, 3),
        "wrong": after.wrong + used.wrong,
        "load": round(os.getloadavg()[0], 1),
    }


def describe(row: Row) -> str:
    """One line of a row."""
    if row["what"] == "rate":
        way = "both ways" if row["answered"] else "up       "
        cpu = (
            f"server {row['server_cpu_seconds_per_gb']:.2f}, of it the body's process "
            f"{row['body_cpu_seconds_per_gb']:.2f} ({row['body_python_seconds_per_gb']:.2f} in Python)"
        )
        return (
            f"{row['ingress']:7}  {row['transport']}  {way}  {row['message_bytes']:>9,} B x {row['streams']:>2}  "
            f"{row['gb_per_second']:.2f} GB/s  CPU s/GB: {cpu}, clients {row['client_cpu_seconds_per_gb']:.2f}"
        )
    return (
        f"{row['ingress']:7}  beside a busy body  {row['gb_per_second']:.2f} GB/s  the body is blocked "
        f"{row['blocked_share']:.1%} of its time"
    )
