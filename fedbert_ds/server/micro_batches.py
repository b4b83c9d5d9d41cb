"""Micro-batches on their way through the body: forward, in flight, backward, pending sends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial

from fedbert_ds.config import WireSection
from fedbert_ds.seeding import stable_seed
from fedbert_ds.server.body.device_work import DeviceWork
from fedbert_ds.server.body.engine import BodyEngine
from fedbert_ds.server.body.packed_input import packed_input
from fedbert_ds.server.contract import Arrived, Contract, Tally
from fedbert_ds.server.held_out_inbox import HeldOutPart
from fedbert_ds.server.network.outbox import Outbox
from fedbert_ds.server.queue.decisions import Backward, Forward
from fedbert_ds.server.queue.packing import Piece
from fedbert_ds.telemetry.trace import Trace
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import to_frame
from fedbert_ds.wire.messages import Manifest
from fedbert_kernels.encoded import Encoded


@dataclass
class InFlight:
    """A micro-batch between its forward and its backward."""

    pieces: tuple[Piece, ...]
    values_per_piece: list[int]
    """Rows of activations of each piece: its tokens, or its distinct rows with cut: rows."""


class MicroBatches:
    """Runs the body on the micro-batches of one window at a time and sends clients the results.

    Dropout depends on `seed` (the run's), the rank, the window and the micro-batch's place in it.
    `tally` counts until `take_tally`.
    """

    def __init__(
        self,
        engine: BodyEngine,
        contract: Contract,
        wire: WireSection,
        outbox: Outbox,
        trace: Trace,
        seed: int,
        rank: int,
        unsound: Set[str] = frozenset(),
    ) -> None:
        self._engine = engine
        self._contract = contract
        self._wire = wire
        self._outbox = outbox
        self._trace = trace
        self._seed = seed
        self._rank = rank
        self._unsound = unsound
        """Clients whose numbers made results that are not finite."""
        self._window = 0
        self._numbers: dict[int, int] = {}
        """Place of each micro-batch in the running window."""
        self._manifests: dict[str, Manifest] = {}
        self._masked_tokens = 0
        self._in_flight: dict[int, InFlight] = {}
        self._pending_sends: deque[tuple[DeviceWork, Callable[[Encoded], bool]]] = deque()
        """Results under way on the device, and the function that sends each.

        It returns false for a dummy's result, which nobody receives.
        """
        self.tally = Tally()
        self.service_seconds = 0.0
        """Seconds of a micro-batch's forward and backward, mean of the last window; 0 at first."""

    def begin(
        self, window: int, micro_batches: Sequence[int], manifests: Sequence[Manifest], masked_tokens: int
    ) -> None:
        """Start a window. Its loss is a mean over `masked_tokens`, those of all ranks."""
        self._window = window
        self._numbers = {micro_batch: number for number, micro_batch in enumerate(micro_batches)}
        self._manifests = {manifest.client: manifest for manifest in manifests}
        self._masked_tokens = masked_tokens

    def forward(self, decision: Forward, arrived: Sequence[Arrived]) -> None:
        """Run a forward over the pieces' activations; hidden states leave once they are ready."""
        micro_batch, pieces = decision.micro_batch, decision.pieces
        # By place in the window: dropout depends neither on order nor on the index, which counts on
        # over windows.
        seed = stable_seed("body dropout", self._seed, self._window, self._rank, self._numbers[micro_batch])
        if pieces:
            body_input = packed_input(pieces, arrived, self._manifests, seed)
        else:
            width = self._contract.activations.width
            body_input = self._engine.dummy_input(width, self._contract.is_rows_cut, seed)
        work = self._engine.forward(micro_batch, body_input, self._wire.hidden_states)
        self.tally.forwards += 1
        self.tally.tokens += sum(piece.tokens for piece in pieces)
        if pieces:
            self.tally.squared_lengths += int(body_input.cu_seqlens.diff().square().sum())
        self.tally.dummy_micro_batches += not pieces
        self._in_flight[micro_batch] = InFlight(pieces, [len(item.values) for item in arrived])
        self._pending_sends.append((work, partial(self._send_hidden, micro_batch, pieces)))

    def backward(self, decision: Backward, gradients: Mapping[str, Encoded]) -> None:
        """Run a backward with d(loss)/d(hidden) by client, [masked, width].

        A piece without a gradient gets zeros.
        """
        micro_batch, form = decision.micro_batch, self._contract.gradients
        flight = self._in_flight.pop(micro_batch)
        self._leave_out_unsound(micro_batch, flight, gradients.keys())
        parts = [
            gradients[piece.client]
            if piece.client in gradients
            else Encoded.zeros(piece.masked, form.width, form.codec)
            for piece in flight.pieces
        ]
        parts = parts or [Encoded.zeros(0, form.width, form.codec)]
        work = self._engine.backward(micro_batch, parts, self._wire.gradients)
        self.tally.backwards += 1
        send = partial(self._send_input_gradients, micro_batch, flight, frozenset(gradients))
        self._pending_sends.append((work, send))

    def _leave_out_unsound(self, micro_batch: int, flight: InFlight, present: Set[str]) -> None:
        """Forward a micro-batch again without the pieces of clients that have spoilt it, and are
        gone: what others sent counts as if these had sent nothing.
        """
        spoilt, end = [], 0
        for piece, values in zip(flight.pieces, flight.values_per_piece, strict=True):
            end += values
            if piece.client in self._unsound and piece.client not in present:
                spoilt.append(slice(end - values, end))
        if spoilt:
            self._engine.blank(micro_batch, spoilt)

    def evaluate(self, window: int, part: HeldOutPart | None) -> None:
        """Run a forward over held-out text, or over nothing where other ranks have some; hidden
        states leave once they are ready.
        """
        width = self._contract.activations.width
        body_input = self._engine.dummy_input(width, self._contract.is_rows_cut, 0) if part is None else part.body_input
        work = self._engine.evaluate(body_input, self._wire.hidden_states)
        self._pending_sends.append((work, partial(self._send_held_out, window, part)))

    @property
    def has_pending_sends(self) -> bool:
        """Whether clients wait for results that are under way on the device or not yet sent."""
        return bool(self._pending_sends)

    def send_finished(self, wait: bool = False) -> None:
        """Send results that the device has finished. With `wait`, first wait for the oldest."""
        while self._pending_sends and (wait or self._pending_sends[0][0].is_done):
            work, send = self._pending_sends.popleft()
            encoded, seconds = work.result()
            # A dummy is not work.
            self.tally.busy_seconds += seconds if send(encoded) else 0.0
            wait = False

    def end(self) -> None:
        """End the window: send the remaining results and set `service_seconds`."""
        while self._pending_sends:
            self.send_finished(wait=True)
        if real := self.tally.forwards - self.tally.dummy_micro_batches:
            self.service_seconds = self.tally.busy_seconds / real

    def take_tally(self) -> Tally:
        """The counts since the last call."""
        tally, self.tally = self.tally, Tally()
        return tally

    def _send_hidden(self, micro_batch: int, pieces: tuple[Piece, ...], hidden: Encoded) -> bool:
        window, wire, masked_tokens = self._window, self._wire, self._masked_tokens

        def message(rows: Encoded) -> pb.ServerMessage:
            frame = to_frame(rows, compressed=wire.is_compressed)
            place = {"window": window, "micro_batch": micro_batch}
            return pb.ServerMessage(hidden=pb.Hidden(**place, values=frame, masked_tokens=masked_tokens))

        for piece, rows in zip(pieces, hidden.split([piece.masked for piece in pieces]), strict=True):
            self._trace.begin("gradient", piece.client, micro_batch=micro_batch)
            self._outbox.send_framed(piece.client, partial(message, rows))
        return bool(pieces)

    def _send_held_out(self, window: int, part: HeldOutPart | None, hidden: Encoded) -> bool:
        if part is not None:
            wire, place = self._wire, {"window": window, "micro_batch": part.number}

            def message() -> pb.ServerMessage:
                frame = to_frame(hidden, compressed=wire.is_compressed)
                return pb.ServerMessage(hidden=pb.Hidden(**place, values=frame, held_out=True))

            self._outbox.send_framed(part.client, message)
        # The body's time is told of training alone.
        return False

    def _send_input_gradients(
        self, micro_batch: int, flight: InFlight, present: frozenset[str], gradient: Encoded
    ) -> bool:
        if not flight.pieces:
            return False
        window, wire = self._window, self._wire

        def message(rows: Encoded) -> pb.ServerMessage:
            frame = to_frame(rows, compressed=wire.is_compressed)
            input_gradient = pb.InputGradient(window=window, micro_batch=micro_batch, values=frame)
            return pb.ServerMessage(input_gradient=input_gradient)

        for piece, rows in zip(flight.pieces, gradient.split(flight.values_per_piece), strict=True):
            if piece.client in present:
                self._outbox.send_framed(piece.client, partial(message, rows))
        return True
