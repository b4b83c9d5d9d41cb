"""Large transfers over a limited link: activations, and a client update whose link drops midway."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from fedbert_ds.bench.network.endpoint import WIDTH, frame_of, sessions, spawn
from fedbert_ds.bench.network.link import DelayProxy
from fedbert_ds.federation.client_update import UpdateAssembler, update_chunks
from fedbert_ds.server.network.endpoint import Endpoint
from fedbert_ds.server.network.events import Attached, Connected, Detached, Received
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.stream import ServerStream

Row = dict[str, Any]
CLIENT = "client-0"
MBIT = 1000
MESSAGE_BYTES = 2_000_000
ACTIVATION_BYTES = 50 * MESSAGE_BYTES
UPDATE_BYTES = 1_400_000_000
OUTAGE_SECONDS = 2.0
TRIES = 5
"""Of the activations, which take about a second: on a machine with other work one says little."""
PATIENCE = 600.0
"""Seconds without anything coming after which something is broken."""


def transfer_rows(is_quick: bool) -> Iterator[Row]:
    """Activations several times, then a client update over a link that drops."""
    for _ in range(TRIES):
        yield activations_row()
    yield update_row(UPDATE_BYTES // 10 if is_quick else UPDATE_BYTES)


def describe(row: Row) -> str:
    """One line of a row."""
    line = (
        f"{row['what']}  {row['bytes'] / 1e6:,.0f} MB at {row['mbit']} Mbit/s: {row['seconds']:.2f} s, "
        f"{row['ratio']:.2f} times the wire's own time"
    )
    if row["cuts"]:
        line += f" and {row['outage_seconds']:.0f} s down; {row['resent_bytes'] / 1e6:.1f} MB sent again"
    return line


def activations_row() -> Row:
    """100 MB of activations over a link of 1 Gbit/s, beside the link's own time for these bytes."""
    with _Transfer("activations", ACTIVATION_BYTES) as transfer:
        for _ in range(ACTIVATION_BYTES // MESSAGE_BYTES):
            transfer.next_message()
        return transfer.row()


def update_row(num_bytes: int = UPDATE_BYTES) -> Row:
    """A client update over a link of 1 Gbit/s that drops midway and is down for two seconds."""
    middle = num_bytes // 2
    cut: dict[str, Any] = {"cut_bytes": (middle, middle + 1), "cuts": 1, "outage_ms": 1000 * OUTAGE_SECONDS}
    with _Transfer("update", num_bytes, **cut) as transfer:
        assembler = UpdateAssembler(_update_shapes(num_bytes), CLIENT)
        while (update := assembler.add(transfer.next_message().update)) is None:
            pass
        row = transfer.row()
        row["is_whole"] = all(bool((tensor == 1.0).all()) for tensor in update.values())
        return row


class _Transfer:
    """An endpoint here, a client in a process of its own, and a link between."""

    def __init__(self, what: str, num_bytes: int, **cut: Any) -> None:
        self._what = what
        self._num_bytes = num_bytes
        self._endpoint = Endpoint("127.0.0.1", 0, None)
        self._link = DelayProxy(f"127.0.0.1:{self._endpoint.start()}", mbit=MBIT, **cut)
        self._endpoint.admit(dict(sessions((CLIENT,))))
        self._started = 0.0

    def __enter__(self) -> _Transfer:
        address = self._link.__enter__()
        self._pipe, other = spawn.Pipe()
        arguments = (other, self._what, address, self._num_bytes)
        self._process = spawn.Process(target=_send, args=arguments, daemon=True)
        self._process.start()
        assert isinstance(self._endpoint.next_event(PATIENCE), Connected)
        self._pipe.send("go")
        self._started = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.join(timeout=60)
        self._link.__exit__()
        self._endpoint.stop(grace=1.0)

    def next_message(self) -> pb.ClientMessage:
        event = self._endpoint.next_event(PATIENCE)
        while isinstance(event, Detached | Attached):  # the link drops, and the client is back
            event = self._endpoint.next_event(PATIENCE)
        assert isinstance(event, Received), event
        return event.message

    def row(self) -> Row:
        seconds = time.monotonic() - self._started
        counts = self._link.counts()
        wire_seconds = self._num_bytes * 8 / (MBIT * 1e6)
        down = OUTAGE_SECONDS * counts["cuts"]
        return {
            "what": self._what,
            "bytes": self._num_bytes,
            "mbit": MBIT,
            "link": "proxy",
            "seconds": round(seconds, 3),
            "wire_seconds": round(wire_seconds, 3),
            "ratio": round(seconds / (wire_seconds + down), 3),
            "cuts": counts["cuts"],
            "outage_seconds": down,
            "crossed_bytes": counts["bytes_up"],
            "resent_bytes": self._pipe.recv(),
            "load": round(os.getloadavg()[0], 1),
        }


def _update_shapes(num_bytes: int) -> dict[str, tuple[int, ...]]:
    return {"word_embeddings.weight": (num_bytes // 4 // WIDTH, WIDTH)}


def _send(pipe: Connection, what: str, address: str, num_bytes: int) -> None:
    torch.set_num_threads(1)
    tensors = {name: torch.ones(shape) for name, shape in _update_shapes(num_bytes).items()} if what == "update" else {}
    frame = frame_of(MESSAGE_BYTES)
    with ServerStream(address, None, CLIENT, sessions((CLIENT,))[CLIENT], shares_memory=False) as stream:
        pipe.recv()
        if what == "update":
            for chunk in update_chunks(0, tensors.items()):
                stream.send(pb.ClientMessage(update=chunk))
        else:
            for number in range(num_bytes // MESSAGE_BYTES):
                stream.send(pb.ClientMessage(activations=pb.Activations(micro_batch=number, values=frame)))
        while not stream.is_idle:
            time.sleep(0.05)
        pipe.send(stream.resent_bytes)
