"""A window from the client's side: server messages in, activations and gradients out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fedbert_ds.client.state import load_state, save_state
from fedbert_ds.data.masking import Batch, BatchStream
from fedbert_ds.errors import WireError
from fedbert_ds.federation.client_update import UpdateAssembler, update_chunks
from fedbert_ds.federation.shared_weights import SharedWeights
from fedbert_ds.federation.strategy import exchange_after, exchange_codec, is_exchanged
from fedbert_ds.model.client_half import Activations, ClientHalf
from fedbert_ds.model.optimizer import build_optimizer
from fedbert_ds.seeding import stable_seed
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import decode, encode, encode_positions, encode_row_index
from fedbert_ds.wire.messages import ClientSettings


@dataclass
class _Piece:
    """This client's part of one micro-batch."""

    tokens: slice
    masked: slice
    sequences: slice
    first_token: int
    activations: Activations | None = None


@dataclass
class _Window:
    """A window from its manifest on until the half has stepped."""

    number: int
    batch: Batch
    cursor_before: dict[str, int]
    """Where the text stood before this window's batch: what a checkpoint keeps."""
    pieces: dict[int, _Piece] = field(default_factory=dict)
    masked_tokens: int = 1
    """M, of all clients."""
    opened: list[int] = field(default_factory=list)
    """Micro-batches that may be sent as soon as the half is done with earlier windows."""
    masked_trained: int = 0
    """Masked tokens whose loss is in the gradients; less than the batch has when pieces were skipped."""


class ClientTrainer:
    """Answers every server message; holds the half, its optimizer and the stream of text.

    `send` takes a ClientMessage. Raises WireError for a message that does not fit, or a refusal.
    """

    def __init__(
        self,
        half: ClientHalf,
        text: BatchStream,
        settings: ClientSettings,
        name: str,
        state_folder: Path,
        first_window: int,
        device: torch.device,
        send: Callable[[pb.ClientMessage], None],
    ) -> None:
        self._half = half.to(device).train()
        self._optimizer = build_optimizer(list(half.named_parameters()), settings.optimizer)
        self._text = text
        self._settings, self._wire = settings, settings.wire
        self._name = name
        self._state_folder = state_folder
        self._device = device
        self._send = send
        self._applied = first_window
        """Windows before this one are done: the half has taken their steps, exchanges with other clients included."""
        self._done: set[int] = set()
        """Windows from there on that are done already."""
        self._next_manifest = first_window
        self._windows: dict[int, _Window] = {}
        self._sent: dict[int, dict[str, Tensor]] = {}
        """Weights as they were sent for an average that is not back yet, by window."""
        self._masked_since_average = 0
        self._masked_seen = self._tokens_seen = 0
        self._awaits_initial_half = first_window == 0
        self._exchanged = {
            name: tuple(parameter.shape)
            for name, parameter in half.named_parameters()
            if is_exchanged(settings.federation, half.parameter_scope(name))
        }
        self._exchange_codec = exchange_codec(settings.federation, self._wire)
        averages_changes = settings.federation.mode == "parallel" and self._exchange_codec != "fp32"
        self._shared = (
            SharedWeights(self._exchanged, self._exchange_codec, compressed=self._wire.is_compressed)
            if averages_changes
            else None
        )
        self._assembler = self._new_assembler()
        self.finish: pb.Finish | None = None
        """The server's last word, once it has come."""
        if first_window:
            self._load(first_window)

    def begin(self) -> None:
        """Announce the first window of a resumed run; a new run begins with the weights the server sends."""
        if not self._awaits_initial_half:
            self._announce()

    def handle(self, message: pb.ServerMessage) -> None:
        """Answer one message of the server."""
        match message.WhichOneof("body"):
            case "plan":
                self._plan(message.plan)
            case "open":
                self._window(message.open.window).opened.append(message.open.micro_batch)
                self._forward_what_may_be()
            case "hidden":
                self._head(message.hidden)
            case "input_gradient":
                self._backward(message.input_gradient)
            case "skipped":
                self._skip(message.skipped)
            case "update":
                self._receive_half(message.update)
            case "save":
                self._save(message.save.window)
            case "update_request":
                weights = dict(self._half.named_parameters())
                self._send_half(message.update_request.window, weights, float(max(1, self._masked_seen)))
            case "finish":
                self.finish = message.finish
            case "refused":
                raise WireError(f"the server refused this client: {message.refused.reason}")
            case other:
                raise WireError(f"the server sent a message of kind {other}, which this version does not know")

    # -- a window -------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        """Draw the next window's batch and tell its sizes."""
        number = self._next_manifest
        if number >= self._settings.windows:
            return
        cursor = self._text.state_dict()
        batch = self._text.next_batch(number, self._settings.tokens)
        self._windows[number] = _Window(number, batch, cursor)
        bounds = torch.tensor([0, *batch.lengths]).cumsum(0)
        counts = torch.searchsorted(batch.masked_positions, bounds)
        manifest = pb.Manifest(window=number, lengths=batch.lengths, masked=counts.diff().tolist())
        self._send(pb.ClientMessage(manifest=manifest))

    def _plan(self, plan: pb.Plan) -> None:
        if plan.next_window <= plan.window:
            raise WireError(f"the server plans window {plan.next_window} after window {plan.window}")
        if plan.pieces:
            self._take_pieces(self._window(plan.window), plan)
        # The next batch is drawn now, while the server works on this one: its manifest is there when it is needed.
        self._next_manifest = plan.next_window
        self._announce()
        if not plan.pieces:
            self._pass_over(plan.window, plan.next_window)

    def _take_pieces(self, window: _Window, plan: pb.Plan) -> None:
        bounds = torch.tensor([0, *window.batch.lengths]).cumsum(0)
        masked_bounds = torch.searchsorted(window.batch.masked_positions, bounds).tolist()
        token_bounds = bounds.tolist()
        for piece in plan.pieces:
            first, last = piece.first_sequence, piece.first_sequence + piece.num_sequences
            if not first < last < len(token_bounds):
                raise WireError(f"the server plans sequences {first} to {last} of {len(token_bounds) - 1}")
            window.pieces[piece.micro_batch] = _Piece(
                tokens=slice(token_bounds[first], token_bounds[last]),
                masked=slice(masked_bounds[first], masked_bounds[last]),
                sequences=slice(first, last),
                first_token=token_bounds[first],
            )

    def _pass_over(self, first: int, next_window: int) -> None:
        """This client was late, so windows from `first` up to the next one go on without it."""
        for number in range(first, next_window):
            # What halves exchange goes to everybody: it is on its way, or has come before this message.
            if exchange_after(self._settings.federation, number) == "nothing":
                self._done_with(number)

    def _forward_what_may_be(self) -> None:
        """Send what the server has asked for, of windows that the half is ready for."""
        for window in list(self._windows.values()):
            if window.number <= self._applied + self._settings.federation.staleness:
                while window.opened:
                    self._forward(window, window.opened.pop(0))

    def _forward(self, window: _Window, micro_batch: int) -> None:
        piece = window.pieces.get(micro_batch)
        if piece is None:
            raise WireError(f"the server asks for micro-batch {micro_batch}, in which this client has no piece")
        if self._settings.federation.staleness:
            # The half may step before the gradient is back, which a graph would not survive: it is built again then.
            with torch.no_grad():
                activations = self._embed(window, piece)
        else:
            activations = self._embed(window, piece)
        piece.activations = activations
        positions = window.batch.masked_positions[piece.masked] - piece.first_token
        message = pb.Activations(
            window=window.number,
            micro_batch=micro_batch,
            values=encode(activations.values, self._wire.activations, compressed=self._wire.is_compressed),
            masked_positions=encode_positions(positions, piece.tokens.stop - piece.tokens.start),
        )
        if activations.row_index is not None:
            message.row_index = encode_row_index(activations.row_index, len(activations.values))
        self._send(pb.ClientMessage(activations=message))

    def _embed(self, window: _Window, piece: _Piece) -> Activations:
        batch = window.batch
        # Dropout of this piece follows from its place alone, so the order of messages does not matter.
        place = window.number, piece.sequences.start
        torch.manual_seed(stable_seed("client dropout", self._settings.seed, self._name, *place))
        return self._half.embed(batch.input_ids[piece.tokens].to(self._device), batch.lengths[piece.sequences])

    def _head(self, message: pb.Hidden) -> None:
        window, piece = self._piece(message)
        window.masked_tokens = max(1, message.masked_tokens)
        window.masked_trained += piece.masked.stop - piece.masked.start
        labels = window.batch.labels[piece.masked].to(self._device)
        shape = (len(labels), self._half.widths.hidden)
        hidden = decode(message.values, shape, self._wire.hidden_states, "hidden states").to(self._device)
        loss_sum, gradient = self._half.head_backward(hidden, labels, 1.0 / window.masked_tokens)
        answer = pb.Gradient(
            window=window.number,
            micro_batch=message.micro_batch,
            hidden=encode(gradient, self._wire.gradients, compressed=self._wire.is_compressed),
            loss_sum=loss_sum,
        )
        self._send(pb.ClientMessage(gradient=answer))

    def _backward(self, message: pb.InputGradient) -> None:
        window, piece = self._piece(message)
        if piece.activations is None:
            raise WireError(f"the server sent an input gradient of micro-batch {message.micro_batch} too many")
        values = self._embed(window, piece).values if self._settings.federation.staleness else piece.activations.values
        gradient = decode(message.values, values.shape, self._wire.gradients, "input gradient")
        values.backward(gradient.to(values.device, values.dtype))
        self._finish_piece(window, message.micro_batch)

    def _skip(self, skipped: pb.Skipped) -> None:
        window = self._windows.get(skipped.window)
        if window is None:
            return
        for micro_batch in skipped.micro_batches:
            window.opened = [opened for opened in window.opened if opened != micro_batch]
            if micro_batch in window.pieces:
                self._finish_piece(window, micro_batch)

    def _finish_piece(self, window: _Window, micro_batch: int) -> None:
        del window.pieces[micro_batch]
        if not window.pieces:
            self._trained(window)

    def _trained(self, window: _Window) -> None:
        """Every piece has its gradient: nothing more of the body's step is needed to step the half."""
        masked = window.masked_trained
        self._masked_since_average += masked
        self._masked_seen += masked
        self._tokens_seen += sum(window.batch.lengths)
        exchange = exchange_after(self._settings.federation, window.number)
        if exchange == "gradients":
            # The step waits for the sum of all clients' gradients.
            self._send_half(window.number, self._take_gradients(), 1.0, self._exchange_codec)
            return
        # FedAvg: each client follows the mean loss of its own tokens, not its share of everybody's.
        own_share = window.masked_tokens / max(1, masked)
        for parameter in self._half.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(own_share)
        self._step(window.number)
        if exchange == "weights":
            weights = {name: p.detach() for name, p in self._half.named_parameters() if name in self._exchanged}
            if self._settings.federation.staleness:
                self._sent[window.number] = {name: tensor.clone() for name, tensor in weights.items()}
            weight = float(max(1, self._masked_since_average))
            if self._shared is None:
                self._send_half(window.number, weights, weight)
            else:
                for chunk in self._shared.changes(window.number, weights, weight):
                    self._send(pb.ClientMessage(update=chunk))
            self._masked_since_average = 0
        else:
            self._done_with(window.number)

    def _step(self, window: int) -> None:
        optimizer = self._settings.optimizer
        if optimizer.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(self._half.parameters(), optimizer.gradient_clipping)
        for group in self._optimizer.param_groups:
            group["lr"] = optimizer.learning_rate(window, self._settings.windows)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _done_with(self, window: int) -> None:
        """The half has taken this window's step."""
        self._done.add(window)
        while self._applied in self._done:
            self._done.remove(self._applied)
            self._applied += 1
        self._windows.pop(window, None)
        self._forward_what_may_be()

    # -- the half on the wire -------------------------------------------------------------------------------------

    def _take_gradients(self) -> dict[str, Tensor]:
        """The half's gradients; with staleness the next window's begin to add up before these come back summed."""
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in self._half.named_parameters()
        }
        self._optimizer.zero_grad()
        return gradients

    def _send_half(self, window: int, tensors: Mapping[str, Tensor], weight: float, codec: str = "fp32") -> None:
        for chunk in update_chunks(window, tensors.items(), weight, codec, compressed=self._wire.is_compressed):
            self._send(pb.ClientMessage(update=chunk))

    def _receive_half(self, chunk: pb.UpdateChunk) -> None:
        complete = self._assembler.add(chunk)
        if complete is None:
            return
        tensors, _ = complete
        if self._awaits_initial_half:
            self._awaits_initial_half = False
            self._set_weights(tensors, {})
            if self._shared is not None:
                self._shared.begin(tensors)
            self._announce()
        elif self._settings.federation.mode == "synchronous":
            self._step_with(tensors, chunk.window)
            self._done_with(chunk.window)
        else:
            average = tensors if self._shared is None else self._shared.apply(tensors)
            self._set_weights(average, self._sent.pop(chunk.window, {}))
            self._done_with(chunk.window)
        self._assembler = self._new_assembler()

    def _step_with(self, gradients: Mapping[str, Tensor], window: int) -> None:
        """Step with these gradients, and leave alone what has been accumulated of later windows."""
        parameters = dict(self._half.named_parameters())
        later = {name: parameter.grad for name, parameter in parameters.items()}
        for name, gradient in gradients.items():
            parameters[name].grad = gradient.to(self._device)
        self._step(window)
        for name, accumulated in later.items():
            parameters[name].grad = accumulated

    @torch.no_grad()
    def _set_weights(self, tensors: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> None:
        """Take over weights; steps made since `sent` went into their average stay."""
        parameters = dict(self._half.named_parameters())
        for name, weights in tensors.items():
            parameter = parameters[name]
            if name in sent:
                parameter.add_(weights.to(self._device) - sent[name])
            else:
                parameter.copy_(weights)

    def _new_assembler(self) -> UpdateAssembler:
        if self._awaits_initial_half:
            shapes = {name: tuple(parameter.shape) for name, parameter in self._half.named_parameters()}
            return UpdateAssembler(shapes, "the server's update")
        return UpdateAssembler(self._exchanged, "the server's update", self._exchange_codec)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self, window: int) -> None:
        # Only the exchange of gradients tells a client of every window; one that was late may have missed some.
        if window > self._applied and self._settings.federation.mode == "synchronous":
            raise WireError(f"the server saves window {window}, this client is at {self._applied}")
        # Batches are drawn ahead.
        drawn = [ahead for number, ahead in self._windows.items() if number >= window]
        cursor = drawn[0].cursor_before if drawn else self._text.state_dict()
        state = {
            "half": self._half.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "cursor": cursor,
            "masked_since_average": self._masked_since_average,
            "masked_seen": self._masked_seen,
            "tokens_seen": self._tokens_seen,
            "shared": self._shared.state_dict() if self._shared is not None else None,
        }
        save_state(self._state_folder, window, state)
        self._send(
            pb.ClientMessage(
                saved=pb.Saved(
                    window=window, peak_memory_bytes=peak_memory_bytes(), flops_per_token=self.flops_per_token()
                )
            )
        )

    def _load(self, window: int) -> None:
        state = load_state(self._state_folder, window)
        self._half.load_state_dict(state["half"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._text.load_state_dict(state["cursor"])
        self._masked_since_average = state["masked_since_average"]
        self._masked_seen, self._tokens_seen = state["masked_seen"], state["tokens_seen"]
        if self._shared is not None:
            self._shared.load_state_dict(state["shared"])

    def flops_per_token(self) -> float:
        """Floating-point operations of this half for one token, forward and backward, at the masking share seen."""
        return self._half.flops_per_token(self._masked_seen / max(1, self._tokens_seen))

    def _window(self, number: int) -> _Window:
        window = self._windows.get(number)
        if window is None:
            raise WireError(f"the server sent a message of window {number}, which this client has not under way")
        return window

    def _piece(self, message: pb.Hidden | pb.InputGradient) -> tuple[_Window, _Piece]:
        window = self._window(message.window)
        piece = window.pieces.get(message.micro_batch)
        if piece is None:
            raise WireError(f"the server asks for micro-batch {message.micro_batch}, in which this client has no piece")
        return window, piece


def peak_memory_bytes() -> int:
    """Most memory this process has held at once (resident set)."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset"))  # noqa: B009 (typed for this system only)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
