"""What clients of a rank have sent: each message is decoded and checked here, before it can meet another client's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedbert_ds.config import Codec, WireSection
from fedbert_ds.errors import WireError
from fedbert_ds.federation.client_update import ClientUpdate, UpdateAssembler
from fedbert_ds.federation.update_exchange import UpdateExchange
from fedbert_ds.server.admission import Seat
from fedbert_ds.server.queue.packing import Piece
from fedbert_ds.server.queue.pipeline_queue import PipelineQueue
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import decode, decode_positions, decode_row_index
from fedbert_ds.wire.messages import checked_manifest


@dataclass(frozen=True)
class Shapes:
    """Widths and limits the wire is checked against."""

    activation_width: int
    hidden_width: int
    longest_sequence: int
    is_rows_cut: bool
    half: dict[str, tuple[int, ...]]
    """Every tensor of a client half."""
    exchanged: frozenset[str]
    """Names of those that are summed or averaged."""
    exchange_codec: Codec = "fp32"
    """How they are coded then; a half that is asked for whole is exact."""


@dataclass(frozen=True)
class Arrived:
    """A piece's activations."""

    values: Tensor
    """[tokens, width], or [rows, width] with cut: rows; fp32."""
    row_index: Tensor | None
    """[tokens] int64 into `values`, with cut: rows."""
    masked_positions: Tensor
    """[masked] int64, within the piece."""


class Inbox:
    """Takes messages of connected clients in; `take_*` hand them on, once.

    `receive` raises WireError for a message that is malformed or that nobody asked for; nothing of it is kept then.
    """

    def __init__(
        self,
        queue: PipelineQueue,
        exchange: UpdateExchange,
        shapes: Shapes,
        wire: WireSection,
        seats: Mapping[str, Seat],
    ) -> None:
        self._queue = queue
        self._shapes = shapes
        self._wire = wire
        self._seats = seats
        self._exchange = exchange
        self._saving = -1
        self._collecting = -1
        self._activations: dict[tuple[int, str], Arrived] = {}
        self._gradients: dict[tuple[int, str], Tensor] = {}
        self._assemblers: dict[str, tuple[int, UpdateAssembler]] = {}
        self.collected: dict[str, ClientUpdate] = {}
        """Whole halves that were asked for, by client."""
        self.saved: dict[str, pb.Saved] = {}
        """Answers to the last Save, by client."""
        self.loss_sum = 0.0
        """Cross-entropies reported with this window's gradients, nats."""
        self.masked_tokens = 0
        """Masked tokens behind `loss_sum`."""
        self.half_bytes = 0
        """Bytes of halves received so far."""

    def begin(self) -> None:
        """Another window runs: losses are summed anew."""
        self.loss_sum, self.masked_tokens = 0.0, 0

    def expect_collected(self, window: int) -> None:
        """Clients have been asked for their whole halves as they are before `window`."""
        self._collecting = window
        self.collected.clear()

    def expect_saved(self, window: int) -> None:
        """Clients have been asked to save their state before `window`."""
        self._saving = window
        self.saved.clear()

    def take_activations(self, micro_batch: int, client: str) -> Arrived:
        """The activations of a client's piece."""
        return self._activations.pop((micro_batch, client))

    def take_gradient(self, micro_batch: int, client: str) -> Tensor:
        """d(loss)/d(hidden) of a client's piece, [masked, width] fp32."""
        return self._gradients.pop((micro_batch, client))

    def drop(self, client: str) -> None:
        """Forget everything of a client that is gone."""
        self.drop_activations(client)
        # A gradient that was here in time still counts; the queue decides.
        self._assemblers.pop(client, None)
        self.collected.pop(client, None)

    def drop_activations(self, client: str) -> None:
        """Windows go on without what a client has sent for forwards to come."""
        self._activations = {key: value for key, value in self._activations.items() if key[1] != client}

    def receive(self, client: str, message: pb.ClientMessage, decoded: Tensor | WireError | None = None) -> bool:
        """Check a message and keep what it brings; False for a manifest that comes too late to be of use.

        `decoded` is the message's tensor, or why it could not be decoded, if that was tried before.
        """
        match message.WhichOneof("body"):
            case "manifest":
                limit = self._seats[client].tokens
                manifest = checked_manifest(client, message.manifest, self._shapes.longest_sequence, limit)
                return self._queue.manifest(manifest)
            case "activations":
                self._receive_activations(client, message.activations, decoded)
            case "gradient":
                self._receive_gradient(client, message.gradient, decoded)
            case "update":
                self.half_bytes += message.ByteSize()
                self._receive_half(client, message.update)
            case "saved":
                saved = message.saved
                if saved.window != self._saving or client in self.saved or not 0 <= saved.flops_per_token < math.inf:
                    raise WireError(f"client {client}: a message about a state it was not asked to save")
                self.saved[client] = saved
            case other:
                raise WireError(f"client {client}: a message of kind {other} was not expected")
        return True

    def _receive_activations(self, client: str, message: pb.Activations, decoded: Tensor | WireError | None) -> None:
        number = message.micro_batch
        who = sender(client, "activations", number)
        if self._queue.was_skipped(client, number):
            return
        piece = self._expected(client, message.window, number, "activations", who)
        num_rows, row_index = piece.tokens, None
        if self._shapes.is_rows_cut:
            num_rows = message.values.shape[0] if message.values.shape else 0
            if not 0 < num_rows <= piece.tokens:
                raise WireError(f"{who}: {num_rows} rows for {piece.tokens} tokens")
            row_index = decode_row_index(message.row_index, piece.tokens, num_rows, who)
        shape = (num_rows, self._shapes.activation_width)
        values = _tensor(message.values, shape, self._wire.activations, who, decoded)
        positions = decode_positions(message.masked_positions, piece.tokens, piece.masked, who)
        self._queue.activations(client, number)
        self._activations[number, client] = Arrived(values, row_index, positions)

    def _receive_gradient(self, client: str, message: pb.Gradient, decoded: Tensor | WireError | None) -> None:
        number = message.micro_batch
        who = sender(client, "gradient", number)
        if self._queue.was_skipped(client, number):
            return
        piece = self._expected(client, message.window, number, "gradient", who)
        shape = (piece.masked, self._shapes.hidden_width)
        gradient = _tensor(message.hidden, shape, self._wire.gradients, who, decoded)
        if not 0 <= message.loss_sum < math.inf:
            raise WireError(f"{who}: a loss of {message.loss_sum}")
        self._queue.gradient(client, number)
        self._gradients[number, client] = gradient
        self.loss_sum += message.loss_sum
        self.masked_tokens += piece.masked

    def _expected(
        self, client: str, window: int, number: int, kind: Literal["activations", "gradient"], who: str
    ) -> Piece:
        piece = self._queue.expected_piece(client, number, kind)
        if window != (planned := self._queue.window_of(number)):
            raise WireError(f"{who}: of window {window} instead of {planned}")
        return piece

    def _receive_half(self, client: str, chunk: pb.UpdateChunk) -> None:
        is_whole = chunk.window == self._collecting
        if client not in self._assemblers:
            if is_whole and client in self.collected:
                raise WireError(f"client {client}: a second half of window {chunk.window}")
            names = self._shapes.half if is_whole else self._shapes.exchanged
            shapes = {name: shape for name, shape in self._shapes.half.items() if name in names}
            codec = "fp32" if is_whole else self._shapes.exchange_codec
            self._assemblers[client] = chunk.window, UpdateAssembler(shapes, f"client {client}: its half", codec)
        window, assembler = self._assemblers[client]
        if chunk.window != window:
            raise WireError(f"client {client}: a half of window {chunk.window} inside that of window {window}")
        self._exchange.progress()
        if not assembler.take(chunk):
            return
        del self._assemblers[client]
        if is_whole:
            self.collected[client] = assembler.finish()
        else:
            self._exchange.deliver(window, client, assembler.finish)


def sender(client: str, what: str, micro_batch: int) -> str:
    """Whose tensor it is, for an error message."""
    return f"client {client}: {what} of micro-batch {micro_batch}"


def _tensor(
    frame: pb.TensorFrame, shape: tuple[int, int], codec: Codec, who: str, decoded: Tensor | WireError | None
) -> Tensor:
    """The tensor of a frame that must have this shape, decoded here unless it was before."""
    if decoded is None or tuple(frame.shape) != shape:
        return decode(frame, shape, codec, who)
    if isinstance(decoded, WireError):
        raise decoded
    return decoded
