"""A program: windows of micro-batches through the engine, with codes, and as it was before: values
decoded on the CPU piece by piece, fp32 into the engine and out of it, encoded piece by piece.

    python codes_worker.py '[[CODECS, CUT, STAGE, PRECISION, MUTATION], ...]'

CODECS are those of activations, hidden states and gradients. A mutation changes a number on the
way; none is "". Prints for each case which server messages and weights differ, and how many there
are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedbert_ds.config import RunConfig
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import split
from fedbert_ds.run_file import parse_config
from fedbert_ds.seeding import stable_seed
from fedbert_ds.server.body.distributed import initialize, shut_down
from fedbert_ds.server.body.engine import BodyEngine
from fedbert_ds.server.body.packed_input import packed_input
from fedbert_ds.server.contract import Arrived, Contract, TensorContract
from fedbert_ds.server.micro_batches import MicroBatches
from fedbert_ds.server.network.decoding import Decoded, decoded
from fedbert_ds.server.network.events import Received
from fedbert_ds.server.queue.decisions import Backward, Forward
from fedbert_ds.server.queue.packing import Piece
from fedbert_ds.telemetry.trace import Trace
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import encode
from fedbert_ds.wire.compression import compress, decompress
from fedbert_ds.wire.messages import Manifest
from fedbert_kernels.encoded import Encoded
from fedbert_kernels.quantize import CODECS, dequantize, quantize

WIDTH, WINDOWS, SEED = 32, 2, 5
FP32 = torch.float32
ZERO = Path(__file__).parents[3] / "configs" / "deepspeed"
MANIFESTS = (Manifest("ada", 0, (5, 7, 6), (1, 2, 1)), Manifest("bo", 0, (9, 4), (3, 1)))
MICRO_BATCHES = (
    (Piece("ada", 0, 2, 12, 3), Piece("bo", 0, 1, 9, 3)),
    (Piece("ada", 2, 1, 6, 1), Piece("bo", 1, 1, 4, 1)),
)
SKIPPED = (1, 1, "bo")
"""The window, micro-batch and client of a piece without a gradient."""


def main(cases: Sequence[tuple[tuple[str, str, str], str, int, str, str]]) -> None:
    initialize()
    for codecs, cut, stage, precision, mutation in cases:
        config = run_config(codecs, cut, stage, precision)
        with pytest.MonkeyPatch.context() as patch:
            before = train(config, AsBefore)
            mutate(patch, mutation)
            now = train(config, WithCodes)
        messages = [one == other for one, other in zip(before[0], now[0], strict=True)]
        weights = [name for name in before[1] if not torch.equal(before[1][name], now[1][name])]
        told = {"messages": len(messages), "other messages": messages.count(False), "other weights": weights}
        print(json.dumps(told))
    shut_down()


def run_config(codecs: tuple[str, str, str], cut: str, stage: int, precision: str) -> RunConfig:
    activations, hidden, gradients = codecs
    return parse_config(
        {
            "cut": cut,
            "body": {"deepspeed": str(ZERO / f"zero{stage}.json"), "precision": precision},
            "model": {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 2, "dropout": 0.1},
            "wire": {"activations": activations, "hidden": hidden, "gradients": gradients},
        },
        "test",
    )


def train(config: RunConfig, kind: Callable[..., Server]) -> tuple[list[bytes], dict[str, Tensor]]:
    """(server messages in order, weights after the last window)."""
    _, body = split(build_model(config.model, 100, 0, 1), config.cut)
    device = torch.device("cpu")
    engine = BodyEngine.build(body, config.body, config.optimizer, "torch", device)
    server = kind(config, engine)
    random = torch.Generator().manual_seed(1)
    for window in range(WINDOWS):
        server.begin(window)
        for number, pieces in enumerate(MICRO_BATCHES):
            server.forward(number, pieces, [client_activations(config, piece, random) for piece in pieces])
        for number, pieces in enumerate(MICRO_BATCHES):
            frames = {}
            for piece in pieces:
                gradient = torch.randn(piece.masked, WIDTH, generator=random) / 50
                frames[piece.client] = encode(gradient, config.wire.gradients, compressed=True)
            if (window, number) == SKIPPED[:2]:
                del frames[SKIPPED[2]]
            server.backward(number, pieces, frames)
        engine.step(0.01)
    return server.sent, engine.full_state()


def client_activations(config: RunConfig, piece: Piece, random: torch.Generator) -> tuple[pb.TensorFrame, Any, Tensor]:
    """(frame, row numbers with cut: rows, masked positions)."""
    index = torch.randint(3, (piece.tokens,), generator=random) if config.cut == "rows" else None
    values = torch.randn(piece.tokens if index is None else 3, WIDTH, generator=random)
    masked = torch.randperm(piece.tokens, generator=random)[: piece.masked].sort().values
    return encode(values, config.wire.activations, compressed=True), index, masked


class WithCodes:
    """The server's rooms, from a message that came to one that leaves."""

    def __init__(self, config: RunConfig, engine: BodyEngine) -> None:
        wire = config.wire
        self.contract = Contract(
            TensorContract(wire.activations, WIDTH, 99), TensorContract(wire.gradients, WIDTH, 99), 9,
            config.cut == "rows", {}, {},
        )  # fmt: skip
        outbox: Any = self
        self.micro_batches = MicroBatches(engine, self.contract, wire, outbox, Trace(None), SEED, 0)
        self.sent: list[bytes] = []

    def send_framed(self, client: str, make: Callable[[], pb.ServerMessage]) -> None:
        self.sent.append(make().SerializeToString())

    def begin(self, window: int) -> None:
        self.micro_batches.begin(window, range(len(MICRO_BATCHES)), MANIFESTS, 9)

    def forward(self, number: int, pieces: tuple[Piece, ...], came: Sequence[Any]) -> None:
        arrived = [
            Arrived(self._encoded(pb.ClientMessage(activations=pb.Activations(values=frame))), index, masked)
            for frame, index, masked in came
        ]
        self.micro_batches.forward(Forward(number, pieces), arrived)
        self.micro_batches.send_finished()

    def backward(self, number: int, pieces: tuple[Piece, ...], frames: dict[str, pb.TensorFrame]) -> None:
        gradients = {
            client: self._encoded(pb.ClientMessage(gradient=pb.Gradient(hidden=frame)))
            for client, frame in frames.items()
        }
        self.micro_batches.backward(Backward(number, pieces), gradients)
        self.micro_batches.end()

    def _encoded(self, message: pb.ClientMessage) -> Encoded:
        event = decoded(Received("ada", message), self.contract)
        assert isinstance(event, Decoded) and isinstance(event.tensor, Encoded)
        return event.tensor


@dataclass
class AsBefore:
    """The same when threads of the CPU decoded and encoded."""

    config: RunConfig
    engine: BodyEngine

    def __post_init__(self) -> None:
        self.sent: list[bytes] = []
        self.rows: dict[int, list[int]] = {}

    def begin(self, window: int) -> None:
        self.window = window

    def forward(self, number: int, pieces: tuple[Piece, ...], came: Sequence[Any]) -> None:
        arrived = [Arrived(uncoded(decode_as_before(frame)), index, masked) for frame, index, masked in came]
        seed = stable_seed("body dropout", SEED, self.window, 0, number)
        body_input = packed_input(pieces, arrived, {manifest.client: manifest for manifest in MANIFESTS}, seed)
        hidden = self.engine.forward(number, body_input, "fp32").result()[0].decode()
        self.rows[number] = [len(item.values) for item in arrived]
        for rows in hidden.split([piece.masked for piece in pieces]):
            frame = encode_as_before(rows, self.config.wire.hidden_states)
            place = {"window": self.window, "micro_batch": number}
            self._send(pb.ServerMessage(hidden=pb.Hidden(**place, values=frame, masked_tokens=9)))

    def backward(self, number: int, pieces: tuple[Piece, ...], frames: dict[str, pb.TensorFrame]) -> None:
        gradients = [
            decode_as_before(frames[piece.client]) if piece.client in frames else torch.zeros(piece.masked, WIDTH)
            for piece in pieces
        ]
        work = self.engine.backward(number, [uncoded(torch.cat(gradients))], "fp32")
        for piece, rows in zip(pieces, work.result()[0].decode().split(self.rows[number]), strict=True):
            if piece.client in frames:
                frame = encode_as_before(rows, self.config.wire.gradients)
                place = {"window": self.window, "micro_batch": number}
                self._send(pb.ServerMessage(input_gradient=pb.InputGradient(**place, values=frame)))

    def _send(self, message: pb.ServerMessage) -> None:
        self.sent.append(message.SerializeToString())


Server = WithCodes | AsBefore


def uncoded(values: Tensor) -> Encoded:
    return Encoded.of(values, "fp32")


def encode_as_before(values: Tensor, codec: str) -> pb.TensorFrame:
    """The wire's encoder, as it was."""
    if codec in CODECS:
        payload, scales = quantize(values, codec)
    else:
        payload = values.to(torch.bfloat16 if codec == "bf16" else torch.float32)
        scales = payload.new_empty(0)
    parts = {}
    for name, part in (("payload", payload), ("scales", scales)):
        content = part.cpu().flatten().view(torch.uint8).numpy().tobytes()
        parts[name] = compress(content, part.itemsize)
    return pb.TensorFrame(codec=codec, shape=values.shape, compressed=True, **parts)


def decode_as_before(frame: pb.TensorFrame) -> Tensor:
    """The wire's decoder, as it was, for a compressed frame that is sound."""
    rows, width = frame.shape
    form = CODECS.get(frame.codec)
    if form is None:
        dtype = torch.bfloat16 if frame.codec == "bf16" else torch.float32
        content = decompress(frame.payload, rows * width * dtype.itemsize, dtype.itemsize, "it")
        return torch.frombuffer(bytearray(content), dtype=dtype).view(rows, width).to(torch.float32)
    parts = []
    for field, columns, dtype in (
        (frame.payload, form.payload_width(width), form.payload),
        (frame.scales, form.num_scales(width), form.scale_dtype),
    ):
        content = decompress(field, rows * columns * dtype.itemsize, dtype.itemsize, "it")
        parts.append(torch.frombuffer(bytearray(content), dtype=dtype).view(rows, columns))
    return dequantize(parts[0], parts[1], frame.codec, width)


def mutate(patch: pytest.MonkeyPatch, mutation: str) -> None:
    """Change a number on the way."""
    decode, join = Encoded.decode, Encoded.join
    match mutation:
        case "rounded":
            patch.setattr(Encoded, "decode", lambda self, dtype=FP32: decode(self).to(torch.bfloat16).to(dtype))
        case "pieces in another order":
            patch.setattr(Encoded, "join", lambda parts, *cat: join(parts[::-1], *cat))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
