"""Messages of a rank's clients. Each is checked here, before it can meet another client's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from fedbert_ds.errors import WireError
from fedbert_ds.federation.client_update import Tensors, UpdateAssembler
from fedbert_ds.federation.update_exchange import UpdateExchange
from fedbert_ds.server.contract import Arrived, Contract
from fedbert_ds.server.cursors import Cursors
from fedbert_ds.server.held_out_inbox import HeldOutInbox
from fedbert_ds.server.influence import Influence
from fedbert_ds.server.network.decoding import sender
from fedbert_ds.server.queue.deadlines import SLOWEST_UPLOAD, Question
from fedbert_ds.server.queue.packing import Piece
from fedbert_ds.server.queue.pipeline_queue import MANIFEST, PipelineQueue
from fedbert_ds.server.remote_exchange import RemoteExchange
from fedbert_ds.server.reports import Reports
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import decode_positions, decode_row_index
from fedbert_ds.wire.messages import check_loss, check_masked, checked_manifest, cursor_numbers
from fedbert_kernels.encoded import Encoded


class Inbox:
    """Takes messages of connected clients in. Each `take_*` hands one on, once.

    `receive` raises WireError for a malformed or unexpected message and keeps nothing of it.
    """

    def __init__(
        self,
        queue: PipelineQueue,
        exchange: UpdateExchange | RemoteExchange,
        cursors: Cursors,
        contract: Contract,
        tokens: Mapping[str, int],
        influence: Influence,
    ) -> None:
        self._queue = queue
        self._exchange = exchange
        self._cursors = cursors
        self._contract = contract
        self._tokens = tokens
        """Tokens of each client in a window."""
        self._influence = influence
        self._saving = self._collecting = -1
        self._activations: dict[tuple[int, str], Arrived] = {}
        self._gradients: dict[tuple[int, str], Encoded] = {}
        self._assemblers: dict[str, tuple[int, UpdateAssembler]] = {}
        self._left_out: dict[str, set[int]] = {}
        """Windows that went on without a client, whose updates may still come."""
        self.reports = Reports()
        """Of clients that train by themselves."""
        self.held_out = HeldOutInbox(contract)
        """Of the evaluation that is under way."""
        self.collected: dict[str, Tensors] = {}
        """Requested whole client models, by client."""
        self.saved: dict[str, pb.Saved] = {}
        """Answers to the last Save, by client."""
        self.loss_sum = 0.0
        """Cross-entropies reported with this window's gradients, nats."""
        self.masked_tokens = 0
        """Masked tokens that `loss_sum` covers."""
        self.losses: dict[str, tuple[float, int]] = {}
        """Both, by client."""
        self.update_bytes = 0
        """Bytes of client updates received so far."""

    def begin(self) -> None:
        """Start the sums of another window."""
        self.loss_sum, self.masked_tokens, self.losses = 0.0, 0, {}

    def expect_collected(self, window: int) -> None:
        """From now on take whole client models, as before `window`."""
        self._collecting = window
        self.collected.clear()

    def expect_saved(self, window: int) -> None:
        """From now on take Saved messages about states before `window`."""
        self._saving = window
        self.saved.clear()

    def take_activations(self, micro_batch: int, client: str) -> Arrived:
        """The activations of a client's piece. KeyError if not here."""
        return self._activations.pop((micro_batch, client))

    def take_gradient(self, micro_batch: int, client: str) -> Encoded:
        """d(loss)/d(hidden) of a client's piece, [masked, width] fp32. KeyError if not here."""
        return self._gradients.pop((micro_batch, client))

    def drop(self, client: str) -> None:
        """Drop the messages of a client that is gone."""
        self.drop_activations(client)
        # A gradient that came in time still counts; the queue decides.
        self._assemblers.pop(client, None)
        self._left_out.pop(client, None)
        self.reports.drop(client)
        self.held_out.drop(client)
        self.collected.pop(client, None)

    def roll_back(self) -> None:
        """Drop every message about a window that is not trained."""
        self._activations.clear()
        self._gradients.clear()
        self._assemblers.clear()
        self._left_out.clear()
        self.reports = Reports()
        self.held_out.begin(-1)
        self.begin()

    def leave_out(self, client: str, windows: Iterable[int]) -> None:
        """These windows go on without the client: its update of each may still come, and is not
        used.
        """
        self._left_out.setdefault(client, set()).update(windows)

    def drop_activations(self, client: str) -> None:
        """Drop those activations of a client that no forward has taken."""
        self._activations = {key: value for key, value in self._activations.items() if key[1] != client}

    @property
    def is_empty(self) -> bool:
        """Whether no activations and no gradients wait to be taken."""
        return not self._activations and not self._gradients

    def receive(self, client: str, message: pb.ClientMessage, tensor: Encoded | WireError | None, now: float) -> bool:
        """Check a message and keep its content. False for a manifest that comes too late.

        `tensor` is the message's tensor, or what is wrong with it. `now` is in seconds of a
        monotonic clock. Raises WireError for a malformed or unexpected message.
        """
        match message.WhichOneof("body"):
            case "manifest":
                longest = self._contract.longest_sequence
                manifest = checked_manifest(client, message.manifest, longest, self._tokens[client])
                check_masked(manifest, self._contract.mask_probability)
                is_in_time = self._queue.manifest(manifest)
                self._cursors.announce(client, manifest.window, cursor_numbers(message.manifest.cursor))
                return is_in_time
            case "activations" if message.activations.held_out_lengths:
                self.held_out.receive_activations(client, message.activations, tensor)
                question = Question("evaluated", message.activations.window)
                self._queue.deadlines.progress(client, question, now)
            case "evaluated":
                question = Question("evaluated", message.evaluated.window)
                is_last = self.held_out.receive_loss(client, message.evaluated)
                note = self._queue.deadlines.answered if is_last else self._queue.deadlines.progress
                note(client, question, now)
            case "activations":
                self._receive_activations(client, message.activations, tensor)
            case "gradient":
                self._receive_gradient(client, message.gradient, tensor)
            case "update":
                self.update_bytes += message.ByteSize()
                self._receive_update(client, message.update, now)
            case "trained":
                question = Question("trained", message.trained.window)
                if self.reports.receive(client, message.trained):
                    self._queue.deadlines.answered(client, question, now)
                else:
                    self._queue.deadlines.progress(client, question, now)
                # It comes to its next manifest once this window is trained.
                self._queue.deadlines.progress(client, MANIFEST, now)
            case "saved":
                saved = message.saved
                if saved.window != self._saving or client in self.saved or not 0 <= saved.flops_per_token < math.inf:
                    raise WireError(f"client {client}: a message about a state it was not asked to save")
                self.saved[client] = saved
                self._queue.deadlines.answered(client, Question("saved", saved.window), now)
            case other:
                raise WireError(f"client {client}: a message of kind {other} was not expected")
        return True

    def _receive_activations(self, client: str, message: pb.Activations, tensor: Encoded | WireError | None) -> None:
        micro_batch = message.micro_batch
        who = sender(client, "activations", micro_batch)
        if self._queue.take_skipped(client, micro_batch):
            return
        piece = self._expected(client, message.window, micro_batch, "activations", who)
        num_rows, row_index = piece.tokens, None
        if self._contract.is_rows_cut:
            num_rows = message.values.shape[0] if message.values.shape else 0
            if not 0 < num_rows <= piece.tokens:
                raise WireError(f"{who}: {num_rows} rows for {piece.tokens} tokens")
            row_index = decode_row_index(message.row_index, piece.tokens, num_rows, who)
        values = _planned(message.values, (num_rows, self._contract.activations.width), tensor, who)
        positions = decode_positions(message.masked_positions, piece.tokens, piece.masked, who)
        self._influence.check(who, values)
        self._queue.answer(client, micro_batch, "activations")
        self._activations[micro_batch, client] = Arrived(values, row_index, positions)

    def _receive_gradient(self, client: str, message: pb.Gradient, tensor: Encoded | WireError | None) -> None:
        micro_batch = message.micro_batch
        who = sender(client, "gradient", micro_batch)
        if self._queue.take_skipped(client, micro_batch):
            return
        piece = self._expected(client, message.window, micro_batch, "gradient", who)
        gradient = _planned(message.hidden, (piece.masked, self._contract.gradients.width), tensor, who)
        check_loss(message.loss_sum, piece.masked, who)
        self._queue.answer(client, micro_batch, "gradient")
        self._gradients[micro_batch, client] = gradient
        self.loss_sum += message.loss_sum
        self.masked_tokens += piece.masked
        loss_sum, masked = self.losses.get(client, (0.0, 0))
        self.losses[client] = loss_sum + message.loss_sum, masked + piece.masked

    def _expected(
        self, client: str, window: int, micro_batch: int, kind: Literal["activations", "gradient"], who: str
    ) -> Piece:
        piece = self._queue.expected_piece(client, micro_batch, kind)
        if window != (planned := self._queue.schedule.window_of(micro_batch)):
            raise WireError(f"{who}: of window {window} instead of {planned}")
        return piece

    def _receive_update(self, client: str, chunk: pb.UpdateChunk, now: float) -> None:
        is_whole = chunk.window == self._collecting
        if client not in self._assemblers:
            if is_whole and client in self.collected:
                raise WireError(f"client {client}: a second client model of window {chunk.window}")
            left_out = self._left_out.get(client, ())
            if not is_whole and chunk.window not in left_out and client not in self._exchange.awaited(chunk.window):
                raise WireError(f"client {client}: an update of window {chunk.window}, which nobody asked for")
            shapes = self._contract.handed_over if is_whole else self._contract.exchanged
            codec = "fp32" if is_whole else self._contract.update_codec
            self._assemblers[client] = chunk.window, UpdateAssembler(shapes, f"client {client}: its update", codec)
        window, assembler = self._assemblers[client]
        if chunk.window != window:
            raise WireError(f"client {client}: an update of window {chunk.window} inside that of window {window}")
        question = Question("client model" if is_whole else "update", window)
        if not assembler.take(chunk):
            self._queue.deadlines.progress(client, question, now, len(chunk.payload) / SLOWEST_UPLOAD)
            return
        del self._assemblers[client]
        if client in self._left_out:  # updates come in order
            self._left_out[client] = {number for number in self._left_out[client] if number > window}
        self._queue.deadlines.answered(client, question, now)
        if is_whole:
            self.collected[client] = assembler.finish()
        else:
            self._exchange.deliver(window, client, assembler.finish)


def _planned(frame: pb.TensorFrame, shape: tuple[int, int], tensor: Encoded | WireError | None, who: str) -> Encoded:
    """The tensor of a frame. Raises WireError for another shape than the planned one."""
    if tuple(frame.shape) != shape:
        raise WireError(f"{who}: shape {frame.shape[:8]} instead of {list(shape)}")
    if isinstance(tensor, WireError):
        raise tensor
    assert tensor is not None
    return tensor
