"""The mathematics of a window at a client: embed, head, backward; answers every server message."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fedbert_ds.client.evaluation import HeldOutEvaluation
from fedbert_ds.client.footprint import peak_memory_bytes
from fedbert_ds.client.replica import Replica
from fedbert_ds.client.state import load_state, save_state, saved_windows
from fedbert_ds.client.whole_window import bounds, sequences, train_window
from fedbert_ds.client.window_state import WindowState
from fedbert_ds.data.masking import Batch, Stream
from fedbert_ds.errors import ConnectionLost, WireError
from fedbert_ds.federation.strategy import strategy_of
from fedbert_ds.model.client_half import Activations, ClientHalf
from fedbert_ds.model.dropout_seed import seed_dropout
from fedbert_ds.seeding import stable_seed
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import decode, encode, encode_positions, encode_row_index
from fedbert_ds.wire.messages import ClientSettings, cursor_numbers


@dataclass
class _Window:
    """The text of one window, and counts of its masked tokens."""

    batch: Batch
    all_masked: int = 1
    """M: masked tokens of all clients."""
    masked: int = 0
    """This client's masked tokens with their loss in the gradients; skipped pieces have none."""


@dataclass
class _Piece:
    """This client's part of one micro-batch."""

    batch: Batch
    first_sequence: int
    """In the window's batch."""
    activations: Activations | None = None


class ClientTrainer:
    """Answers every server message; holds the client half and the stream of text.

    `send` takes a ClientMessage. `held_out` is the text that evaluations read. The server's first
    message, and every roll-back, is a Begin: it says which window is next and where the text goes
    on. Raises WireError for a message that does not fit, or a refusal.
    """

    def __init__(
        self,
        half: ClientHalf,
        text: Stream,
        settings: ClientSettings,
        name: str,
        state_folder: Path,
        device: torch.device,
        send: Callable[[pb.ClientMessage], None],
        held_out: Batch | None = None,
    ) -> None:
        self._half = half.to(device).train()
        self._text = text
        self._settings, self._wire = settings, settings.wire
        self._name = name
        self._state_folder = state_folder
        self._device = device
        self._send = send
        self._strategy = strategy_of(settings.federation, settings.wire, half.cut)
        self._replica = Replica(self._half, settings, state_folder)
        self._staleness = settings.federation.staleness
        self._windows: WindowState[_Window, _Piece] = WindowState(self._strategy, self._staleness)
        self._evaluation = HeldOutEvaluation(
            self._half, held_out, self._wire, settings.tokens_per_micro_batch, device, send
        )
        self._evaluate_at: int | None = None
        """The window to evaluate before, once the half has the steps of all earlier ones."""
        self._next_window = 0
        self._awaits_reference = False
        self.finish: pb.Finish | None = None
        """The server's last message, once it has come."""

    def handle(self, message: pb.ServerMessage) -> None:
        """Answer one message of the server."""
        match message.WhichOneof("body"):
            case "begin":
                self._begin(message.begin)
            case "plan":
                self._plan(message.plan)
            case "open":
                self._windows.open(message.open.window, message.open.micro_batch)
                self._send_activations()
            case "hidden" if message.hidden.held_out:
                self._evaluation.hidden(message.hidden)
            case "hidden":
                self._head(message.hidden)
            case "input_gradient":
                self._backward(message.input_gradient)
            case "skipped":
                if self._windows.skip(message.skipped.window, message.skipped.micro_batches):
                    self._finish_window(message.skipped.window)
            case "update":
                if self._replica.receive(message.update):
                    self._apply(message.update.window)
            case "reference":
                self._receive_reference(message.reference)
            case "evaluate":
                self._evaluate_at = message.evaluate.window
                self._evaluate()
            case "save":
                self._save(message.save.window)
            case "update_request":
                self._send_update(self._replica.handed_over(message.update_request.window))
            case "finish":
                self.finish = message.finish
            case "refused" if message.refused.may_return:
                raise ConnectionLost(f"the server went on without this client: {message.refused.reason}")
            case "refused":
                raise WireError(f"the server refused this client: {message.refused.reason}")
            case other:
                raise WireError(f"the server sent a message of kind {other}, which this version does not know")

    def flops_per_token(self) -> float:
        """Floating-point operations of the client half per token, forward and backward."""
        return self._replica.flops_per_token()

    # -- where to go on ----------------------------------------------------------------------------

    def _begin(self, begin: pb.Begin) -> None:
        """Forget every window under way, and go on where the server says."""
        # A reference from elsewhere may be newer: the server then answers that the window is over.
        if begin.next_window < begin.window and not begin.reference:
            raise WireError(f"the server goes on with window {begin.next_window} from a state of {begin.window}")
        self._send(pb.ClientMessage(begun=pb.Begun(attempt=begin.attempt)))
        self._next_window = begin.next_window
        self._windows = WindowState(self._strategy, self._staleness, begin.window)
        self._windows.miss(begin.window, begin.next_window)
        self._replica.forget_windows()
        self._evaluation.cancel()
        self._evaluate_at = None
        self._text.load_state_dict(cursor_numbers(begin.cursor) if begin.HasField("cursor") else None)
        self._awaits_reference = begin.reference
        if begin.reference:
            return
        if self._strategy.halves_are_personal:
            self._replica.load_state_dict(load_state(self._state_folder, begin.window))
        self._announce()

    def _receive_reference(self, chunk: pb.ReferenceChunk) -> None:
        if not self._awaits_reference:
            raise WireError("the server sent a reference client model to a client that has one")
        if not self._replica.receive_reference(chunk):
            return
        self._awaits_reference = False
        if self._strategy.halves_are_personal and self._next_window:
            self._take_personal_parts()
        self._announce()

    def _take_personal_parts(self) -> None:
        """In the middle of a run: what the reference does not hold comes from the own folder."""
        # Later ones are of windows that were undone since.
        saved = [window for window in saved_windows(self._state_folder) if window <= self._next_window]
        if saved:
            self._replica.load_personal_parts(load_state(self._state_folder, saved[-1]))
            what = f"its own parts and moments as of window {saved[-1]}"
        else:
            what = f"no state in {self._state_folder}: its own parts and moments begin anew"
        print(f"client {self._name}: in at window {self._next_window}, with {what}", flush=True)

    # -- a window ----------------------------------------------------------------------------------

    def _announce(self) -> None:
        """Draw the next window's batch and send its sizes."""
        window = self._next_window
        if window >= self._settings.windows:
            return
        batch = self._text.next_batch(window, self._settings.tokens)
        self._windows.announce(window, _Window(batch))
        _, masked_bounds = bounds(batch)
        manifest = pb.Manifest(
            window=window,
            lengths=batch.lengths,
            masked=[end - start for start, end in itertools.pairwise(masked_bounds)],
            cursor=pb.Cursor(**self._text.state_dict()),
        )
        self._send(pb.ClientMessage(manifest=manifest))

    def _plan(self, plan: pb.Plan) -> None:
        if plan.next_window <= plan.window:
            raise WireError(f"the server plans window {plan.next_window} after window {plan.window}")
        if plan.pieces:
            parts = _cut(self._windows.content(plan.window).batch, plan.pieces)
            if not self._strategy.trains_alone:
                _check_sizes(parts, self._settings)
            self._windows.plan(plan.window, parts)
        # The next batch is drawn while the server works on this one, so its manifest is in time.
        self._next_window = plan.next_window
        self._announce()
        # Other windows than its own run without this client; so does one in which it has no piece.
        self._windows.miss(plan.window + bool(plan.pieces), plan.next_window)
        self._send_activations()

    def _send_activations(self) -> None:
        """Send the pieces that have credit, of windows the half is recent enough for."""
        for window, micro_batch in self._windows.take_sendable():
            if self._strategy.trains_alone:
                self._train_alone(window, micro_batch)
                continue
            piece = self._windows.piece(window, micro_batch)
            # With staleness the half may step before the gradient is back: no graph is kept.
            with torch.set_grad_enabled(not self._staleness):
                piece.activations = self._embed(window, piece)
            values, row_index = piece.activations.values, piece.activations.row_index
            message = pb.Activations(
                window=window,
                micro_batch=micro_batch,
                values=encode(values, self._wire.activations, compressed=self._wire.is_compressed),
                masked_positions=encode_positions(piece.batch.masked_positions, len(piece.batch.input_ids)),
            )
            if row_index is not None:
                message.row_index = encode_row_index(row_index, len(values))
            self._send(pb.ClientMessage(activations=message))

    def _embed(self, window: int, piece: _Piece) -> Activations:
        self._seed_dropout("client dropout", window, piece)
        batch = piece.batch
        kinds = None if batch.token_types is None else batch.token_types.to(self._device)
        return self._half.embed(batch.input_ids.to(self._device), batch.lengths, kinds)

    def _seed_dropout(self, of: str, window: int, piece: _Piece) -> None:
        # Dropout depends on the piece's place alone, not on the order of messages.
        seed_dropout(stable_seed(of, self._settings.seed, self._name, window, piece.first_sequence), self._device)

    def _train_alone(self, number: int, piece: int) -> None:
        """Compute a window of the whole model, and report its loss part by part."""
        window = self._windows.content(number)
        seed = ("client dropout", self._settings.seed, self._name, number)
        for part in train_window(self._half, window.batch, self._settings.tokens_per_micro_batch, seed, self._device):
            report = pb.Trained(
                window=number, loss_sum=part.loss_sum, masked_tokens=part.masked_tokens, last=part.is_last
            )
            self._send(pb.ClientMessage(trained=report))
        window.masked = len(window.batch.labels)
        window.all_masked = max(1, window.masked)
        self._windows.finish(number, piece)
        self._finish_window(number)

    def _head(self, message: pb.Hidden) -> None:
        window = self._windows.content(message.window)
        piece = self._windows.piece(message.window, message.micro_batch)
        window.all_masked = max(1, message.masked_tokens)
        window.masked += len(piece.batch.labels)
        labels = piece.batch.labels.to(self._device)
        shape = (len(labels), self._half.widths.hidden)
        hidden = decode(message.values, shape, self._wire.hidden_states, "hidden states", self._device)
        if self._half.task is not None:
            # A masked LM's head has no dropout.
            self._seed_dropout("head dropout", message.window, piece)
        loss_sum, gradient = self._half.head_backward(hidden, labels, 1.0 / window.all_masked)
        answer = pb.Gradient(
            window=message.window,
            micro_batch=message.micro_batch,
            hidden=encode(gradient, self._wire.gradients, compressed=self._wire.is_compressed),
            loss_sum=loss_sum,
        )
        self._send(pb.ClientMessage(gradient=answer))

    def _backward(self, message: pb.InputGradient) -> None:
        piece = self._windows.piece(message.window, message.micro_batch)
        if piece.activations is None:
            raise WireError(f"the server sent an input gradient of micro-batch {message.micro_batch} too many")
        values = self._embed(message.window, piece).values if self._staleness else piece.activations.values
        gradient = decode(message.values, values.shape, self._wire.gradients, "input gradient", values.device)
        values.backward(gradient.to(values.dtype))
        if self._windows.finish(message.window, message.micro_batch):
            self._finish_window(message.window)

    def _finish_window(self, number: int) -> None:
        """Every piece has its gradient: step or send the update, as the strategy says."""
        window = self._windows.content(number)
        tokens = sum(window.batch.lengths)
        self._send_update(self._replica.finish_window(number, tokens, window.masked, window.all_masked))
        if self._strategy.exchange_after(number) == "nothing":
            self._apply(number)

    def _apply(self, window: int) -> None:
        """The half has taken a window's step."""
        self._windows.apply(window)
        self._send_activations()
        self._evaluate()

    def _evaluate(self) -> None:
        """Begin an evaluation that is due. The update before it may still be on its way, where it
        comes from an aggregator of another party.
        """
        if self._evaluate_at is not None and self._windows.applied >= self._evaluate_at:
            window, self._evaluate_at = self._evaluate_at, None
            self._evaluation.begin(window)

    # -- updates and checkpoints -------------------------------------------------------------------

    def _send_update(self, chunks: Iterable[pb.UpdateChunk]) -> None:
        for chunk in chunks:
            self._send(pb.ClientMessage(update=chunk))

    def _save(self, window: int) -> None:
        if window > self._windows.applied and self._strategy.needs_every_window:
            raise WireError(f"the server saves window {window}, this client is at {self._windows.applied}")
        if self._strategy.halves_are_personal:
            save_state(self._state_folder, window, self._replica.state_dict())
        saved = pb.Saved(window=window, peak_memory_bytes=peak_memory_bytes(), flops_per_token=self.flops_per_token())
        self._send(pb.ClientMessage(saved=saved))


def _cut(batch: Batch, pieces: Iterable[pb.Piece]) -> dict[int, _Piece]:
    """This client's parts of micro-batches; WireError for sequences the batch does not have."""
    parts = {}
    for piece in pieces:
        first, last = piece.first_sequence, piece.first_sequence + piece.num_sequences
        if not first < last <= len(batch.lengths):
            raise WireError(f"the server plans sequences {first} to {last} of {len(batch.lengths)}")
        parts[piece.micro_batch] = _Piece(sequences(batch, first, last), first)
    return parts


def _check_sizes(parts: Mapping[int, _Piece], settings: ClientSettings) -> None:
    """WireError for a part that takes more memory than the run's settings said."""
    most = max(settings.tokens_per_micro_batch, settings.sequences.sequence_length)
    for micro_batch, part in parts.items():
        if (tokens := sum(part.batch.lengths)) > most:
            raise WireError(f"the server plans {tokens} tokens for micro-batch {micro_batch}, the run has {most}")
