"""`fedbert-ds bench network`: what a rank's endpoint accepts and what that costs, without a model.

codecs      tokens/s of a rank's decoding and encoding threads, beside what a body needs: a minute
ingress     rates and processor time over loopback, a few minutes
transfers   100 MB of activations, and a client update over a link that drops: a minute
streams     many clients at one endpoint for a long time
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbert_ds.bench.network import codecs, ingress, streams, transfers
from fedbert_ds.telemetry.record import source_commit, write_record

QUICK_MINUTES = 0.1


@dataclass(frozen=True)
class NetworkOptions:
    """What a user gives the benchmark."""

    out: Path
    """The record."""
    command: str
    """What the user typed, for the record."""
    what: tuple[str, ...] = ("codecs", "ingress", "transfers")
    """Parts, in this order."""
    streams: int = 256
    minutes: float = 10.0
    """Of the streams."""
    quick: bool = False


def bench_network(options: NetworkOptions) -> None:
    """Measure every part, print a line for each row, write the record."""
    commit = source_commit()
    rows = []
    for part in options.what:
        measure, describe = PARTS[part]
        for row in measure(options):
            rows.append(row)
            if line := describe(row):
                print(line, flush=True)
    write_record(options.out, command=options.command, commit=commit, rows=rows)
    print(f"record  {options.out}")


def _streams(options: NetworkOptions) -> Iterator[dict[str, Any]]:
    return streams.stream_rows(options.streams, 60 * (QUICK_MINUTES if options.quick else options.minutes))


PARTS: dict[str, tuple[Callable[[NetworkOptions], Iterator[dict[str, Any]]], Callable[[dict[str, Any]], str]]] = {
    "codecs": (lambda options: codecs.codec_rows(options.quick), codecs.describe),
    "ingress": (lambda options: ingress.ingress_rows(options.quick), ingress.describe),
    "transfers": (lambda options: transfers.transfer_rows(options.quick), transfers.describe),
    "streams": (_streams, streams.describe),
}
"""How to measure each part, and the line that a row of it prints; an empty one prints nothing."""
