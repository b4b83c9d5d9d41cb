"""What a rank's threads take in and send out again, in tokens/s, beside what a body needs.

Micro-batches of int8 messages pass the decoding threads, and the body's answers the outbox; there
is neither a body nor a network. Two ways take turns: `codes`, where threads decompress, check and
compress, and the body's device does the rest; and `values`, where one thread each way decodes to
fp32 or encodes, and the main thread concatenates.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fedbert_ds.config import Codec
from fedbert_ds.server.body.cores import allowed_cores
from fedbert_ds.server.contract import Contract, TensorContract
from fedbert_ds.server.network.decoding import Decoded, Decoding
from fedbert_ds.server.network.events import Event, Received
from fedbert_ds.server.network.outbox import Outbox
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import decode, encode, to_frame
from fedbert_kernels.encoded import Encoded

Row = dict[str, Any]
CODEC: Codec = "int8"
WIDTH = 768
PIECES, PIECE_TOKENS, MASK_SHARE = 4, 2048, 0.15
"""Of a micro-batch: clients, their tokens, and the share of these that is masked."""
DISTINCT_SHARE = 0.305
"""Share of distinct words among 2048 tokens of WikiText, as the planner counts them."""
NEEDED = 780_000
"""Tokens/s of a body of BERT-base on an H200, as estimated."""
CUTS = ("embeddings", "rows")
WAYS = ("values", "codes")
ROUNDS, MICRO_BATCHES = 7, 8
QUICK_ROUNDS, QUICK_MICRO_BATCHES = 1, 1


@dataclass(frozen=True)
class Traffic:
    """The messages of one micro-batch, by piece, and the body's answers."""

    up: Sequence[pb.ClientMessage]
    """Activations, then gradients."""
    down: Sequence[torch.Tensor]
    """Hidden states [masked, width], then gradients of the activations; fp32."""
    rows: int
    """Rows of activations of a piece."""
    bytes_per_token: float
    """Each way."""


def codec_rows(is_quick: bool) -> Iterator[Row]:
    """A row for each cut and way."""
    rounds, micro_batches = (QUICK_ROUNDS, QUICK_MICRO_BATCHES) if is_quick else (ROUNDS, MICRO_BATCHES)
    tokens = micro_batches * PIECES * PIECE_TOKENS
    for cut in CUTS:
        traffic = traffic_of(cut)
        threads = {"values": 1, "codes": max(1, len(allowed_cores()))}
        passes = {"values": partial(pass_values, traffic), "codes": partial(pass_codes, traffic, threads["codes"])}
        measured: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for way in [*WAYS, *WAYS * rounds]:  # the first of each warms up
            measured[way].append(_seconds(passes[way], micro_batches))
        for way in WAYS:
            wall, cpu = (statistics.median(column) for column in zip(*measured[way][1:], strict=True))
            yield {
                "what": "codecs",
                "cut": cut,
                "codec": CODEC,
                "way": way,
                "threads_each_way": threads[way],
                "tokens_per_second": round(tokens / wall),
                "cpu_microseconds_per_token": round(1e6 * cpu / tokens, 3),
                "bytes_per_token_each_way": round(traffic.bytes_per_token, 1),
                "needed_tokens_per_second": NEEDED,
                "cores_needed": round(NEEDED * cpu / tokens, 2),
                "gbit_needed_each_way": round(8e-9 * NEEDED * traffic.bytes_per_token, 2),
                "rounds": rounds,
                "load": round(os.getloadavg()[0], 1),
            }


def describe(row: Row) -> str:
    """One line of a row."""
    return (
        f"codecs  {row['cut']:10}  {row['way']:6} by {row['threads_each_way']:>2} threads each way  "
        f"{row['tokens_per_second'] / 1e3:,.0f}k tokens/s, {row['cpu_microseconds_per_token']:.2f} CPU us a token; "
        f"{row['needed_tokens_per_second'] / 1e3:.0f}k take {row['cores_needed']:.1f} cores and "
        f"{row['gbit_needed_each_way']:.1f} Gbit/s each way"
    )


def traffic_of(cut: str) -> Traffic:
    """Normal values of a micro-batch's sizes, compressed."""
    random = torch.Generator().manual_seed(1)
    rows = int(DISTINCT_SHARE * PIECE_TOKENS) if cut == "rows" else PIECE_TOKENS
    masked = int(MASK_SHARE * PIECE_TOKENS)
    up: list[pb.ClientMessage] = []
    down: list[torch.Tensor] = []
    num_bytes = 0
    for number_of_rows in (rows, masked):
        for _ in range(PIECES):
            values = torch.randn(number_of_rows, WIDTH, generator=random)
            frame = encode(values, CODEC, compressed=True)
            message = (
                pb.ClientMessage(activations=pb.Activations(values=frame))
                if number_of_rows == rows
                else pb.ClientMessage(gradient=pb.Gradient(hidden=frame))
            )
            up.append(message)
            down.append(values)
            num_bytes += message.ByteSize()
    return Traffic(up, down, rows, num_bytes / (PIECES * PIECE_TOKENS))


def pass_codes(traffic: Traffic, threads: int, micro_batches: int) -> Callable[[], None]:
    """As a rank with a GPU does it, but for the copies. Returns what is to be timed."""
    form = TensorContract(CODEC, WIDTH, PIECE_TOKENS)
    contract = Contract(form, form, PIECE_TOKENS, traffic.rows < PIECE_TOKENS, {}, {})
    events = iter([Received("client", message) for _ in range(micro_batches) for message in traffic.up])
    answers = [Encoded.of(values, CODEC) for values in traffic.down]

    def source(timeout: float) -> Event | None:
        event = next(events, None)
        if event is None:
            time.sleep(timeout)
        return event

    def run() -> None:
        decoding, outbox = Decoding(source, contract, threads), Outbox(Sink(), threads)
        decoding.start()
        for _ in range(micro_batches):
            for _ in traffic.up:
                event = decoding.next_event(60.0)
                assert isinstance(event, Decoded) and isinstance(event.tensor, Encoded)
            for answer in answers:
                outbox.send_framed("client", partial(_message, answer))
        outbox.settle()
        decoding.stop()

    return run


def pass_values(traffic: Traffic, micro_batches: int) -> Callable[[], None]:
    """A thread decodes, one encodes, and the main thread concatenates pieces for an upload."""

    def decoded(message: pb.ClientMessage) -> torch.Tensor:
        is_gradient = message.HasField("gradient")
        frame = message.gradient.hidden if is_gradient else message.activations.values
        return decode(frame, frame.shape, CODEC, "it")

    def run() -> None:
        with ThreadPoolExecutor(1) as decoding, ThreadPoolExecutor(1) as encoding:
            arriving = [decoding.submit(decoded, message) for _ in range(micro_batches) for message in traffic.up]
            for start in range(0, len(arriving), PIECES):
                torch.cat([arrived.result() for arrived in arriving[start : start + PIECES]])
                # What is decoded is taken away, as by an upload.
                arriving[start : start + PIECES] = [None] * PIECES  # type: ignore[list-item]
                first = start % len(traffic.down)
                for values in traffic.down[first : first + PIECES]:
                    encoding.submit(_send_encoded, values)

    return run


class Sink:
    """An endpoint that serializes messages, as the real one, and drops them."""

    def send(self, client: str, message: pb.ServerMessage) -> None:
        """Serialize it."""
        message.SerializeToString()

    def close(self, client: str, last: pb.ServerMessage) -> None:
        """Nobody is there."""

    def take_bytes(self) -> tuple[int, int]:
        """Nothing is counted."""
        return 0, 0


def _message(answer: Encoded) -> pb.ServerMessage:
    return pb.ServerMessage(hidden=pb.Hidden(values=to_frame(answer, compressed=True)))


def _send_encoded(values: torch.Tensor) -> None:
    frame = encode(values, CODEC, compressed=True)
    Sink().send("client", pb.ServerMessage(hidden=pb.Hidden(values=frame)))


def _seconds(prepare: Callable[[int], Callable[[], None]], micro_batches: int) -> tuple[float, float]:
    """(wall seconds, CPU seconds of this process)."""
    run = prepare(micro_batches)
    wall, cpu = time.monotonic(), time.process_time()
    run()
    return time.monotonic() - wall, time.process_time() - cpu
