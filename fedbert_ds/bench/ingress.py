"""What an endpoint accepts and what that costs, over loopback: `fedbert-ds bench ingress`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbert_ds.bench.endpoint import ClientProcess, EndpointProcess, Load
from fedbert_ds.bench.record import source_commit, write_record
from fedbert_ds.bench.transfers import HALF_BYTES, activations_row, half_row

MESSAGE_BYTES = (64 << 10, 1 << 20, 4 << 20)
STREAMS = (1, 4, 16)
TRANSPORTS = ("socket", "shared")
ROW_BYTES = 1_000_000_000
QUICK_ROW_BYTES = 100_000_000


@dataclass(frozen=True)
class IngressOptions:
    """What a user asks for."""

    out: Path
    command: str
    quick: bool = False


def bench_ingress(options: IngressOptions) -> None:
    """Measure every row, print it and write the record."""
    commit = source_commit()
    rows = []
    for row in _rows(options.quick):
        print(describe(row), flush=True)
        rows.append(row)
    write_record(options.out, command=options.command, commit=commit, rows=rows)
    print(f"record  {options.out}")


def _rows(is_quick: bool) -> Iterator[dict[str, Any]]:
    yield from rate_rows(QUICK_ROW_BYTES if is_quick else ROW_BYTES)
    yield activations_row()
    yield half_row(HALF_BYTES // 10 if is_quick else HALF_BYTES)


def rate_rows(num_bytes: int) -> Iterator[dict[str, Any]]:
    """A row for each transport, direction, message size and number of streams; each moves `num_bytes` up."""
    for transport, is_answered, message_bytes in itertools.product(TRANSPORTS, (False, True), MESSAGE_BYTES):
        names = [tuple(f"client-{streams}-{number}" for number in range(streams)) for streams in STREAMS]
        answer_bytes = message_bytes if is_answered else 0
        with (
            EndpointProcess(sum(names, ()), answer_bytes=answer_bytes) as endpoint,
            ClientProcess() as clients,
        ):
            for streams, clients_of_row in zip(STREAMS, names, strict=True):
                load = Load(
                    address=endpoint.address,
                    clients=clients_of_row,
                    message_bytes=message_bytes,
                    messages=max(1, num_bytes // message_bytes // streams),
                    shares_memory=transport == "shared",
                )
                before = endpoint.usage()
                started = time.monotonic()
                clients.run(load)
                used = clients.result()
                seconds = time.monotonic() - started
                after = endpoint.usage()
                moved = (after.num_bytes - before.num_bytes) * (1 + is_answered) / 1e9
                yield {
                    "what": "rate",
                    "transport": transport,
                    "answered": is_answered,
                    "message_bytes": message_bytes,
                    "streams": streams,
                    "gb": round(moved, 4),
                    "seconds": round(seconds, 3),
                    "gb_per_second": round(moved / seconds, 3),
                    "server_cpu_seconds_per_gb": round((after.cpu_seconds - before.cpu_seconds) / moved, 3),
                    "server_python_seconds_per_gb": round((after.python_seconds - before.python_seconds) / moved, 3),
                    "client_cpu_seconds_per_gb": round(used.cpu_seconds / moved, 3),
                    "wrong": after.wrong + used.wrong,
                }


def describe(row: dict[str, Any]) -> str:
    """One line of a row."""
    if row["what"] == "rate":
        way = "both ways" if row["answered"] else "up       "
        cpu = f"server {row['server_cpu_seconds_per_gb']:.2f} ({row['server_python_seconds_per_gb']:.2f} in Python)"
        return (
            f"{row['transport']}  {way}  {row['message_bytes']:>9,} B x {row['streams']:>2} streams  "
            f"{row['gb_per_second']:.2f} GB/s  CPU s/GB: {cpu}, clients {row['client_cpu_seconds_per_gb']:.2f}"
        )
    line = (
        f"{row['what']}  {row['bytes'] / 1e6:,.0f} MB at {row['mbit']} Mbit/s: {row['seconds']:.2f} s, "
        f"the wire's own time {row['wire_seconds']:.2f} s"
    )
    if row["cuts"]:
        line += f", down for {row['outage_seconds']:.0f} s; {row['resent_bytes'] / 1e6:.1f} MB sent again"
    return line
