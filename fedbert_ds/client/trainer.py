"""A window from the client's side: server messages in, activations and gradients out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fedbert_ds.client.state import load_state, save_state
from fedbert_ds.data.masking import Batch, BatchStream
from fedbert_ds.errors import WireError
from fedbert_ds.federation.modes import exchange_after, is_exchanged
from fedbert_ds.model.client_half import Activations, ClientHalf
from fedbert_ds.model.optimizer import build_optimizer
from fedbert_ds.seeding import stable_seed
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import decode, encode, encode_positions, encode_row_index
from fedbert_ds.wire.messages import ClientSettings, HalfAssembler, half_chunks


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
    """The window under way."""

    number: int
    batch: Batch
    cursor_before: dict[str, int]
    """Where the text stood before this window's batch: what a checkpoint keeps."""
    pieces: dict[int, _Piece] = field(default_factory=dict)
    masked_tokens: int = 0
    """M, of all clients."""
    unfinished: int = 0
    """Pieces whose input gradient is not back yet."""


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
        self._settings = settings
        self._name = name
        self._state_folder = state_folder
        self._device = device
        self._send = send
        self._next_window = first_window
        self._window: _Window | None = None
        self._masked_since_average = 0
        self._masked_seen = self._tokens_seen = 0
        self._awaits_initial_half = first_window == 0
        self._exchanged = {
            name: tuple(parameter.shape)
            for name, parameter in half.named_parameters()
            if is_exchanged(settings.federation, half.parameter_scope(name))
        }
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
                self._forward(message.open.micro_batch)
            case "hidden":
                self._head(message.hidden)
            case "input_gradient":
                self._backward(message.input_gradient)
            case "stepped":
                self._stepped()
            case "half":
                self._receive_half(message.half)
            case "save":
                self._save(message.save.window)
            case "half_request":
                self._send_half(
                    message.half_request.window, dict(self._half.named_parameters()), float(max(1, self._masked_seen))
                )
            case "finish":
                self.finish = message.finish
            case "refused":
                raise WireError(f"the server refused this client: {message.refused.reason}")
            case other:
                raise WireError(f"the server sent a message of kind {other}, which this version does not know")

    # -- a window -------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        """Draw the next window's batch and tell its sizes."""
        number = self._next_window
        if number >= self._settings.windows:
            return
        cursor = self._text.state_dict()
        batch = self._text.next_batch(number, self._settings.tokens)
        self._window = _Window(number, batch, cursor)
        bounds = torch.tensor([0, *batch.lengths]).cumsum(0)
        counts = torch.searchsorted(batch.masked_positions, bounds)
        manifest = pb.Manifest(window=number, lengths=batch.lengths, masked=counts.diff().tolist())
        self._send(pb.ClientMessage(manifest=manifest))

    def _plan(self, plan: pb.Plan) -> None:
        window = self._current()
        window.masked_tokens = max(1, plan.masked_tokens)
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
        window.unfinished = len(window.pieces)

    def _forward(self, micro_batch: int) -> None:
        window, piece = self._current(), self._piece(micro_batch)
        batch = window.batch
        # Dropout of this piece follows from its place alone, so the order of messages does not matter.
        torch.manual_seed(stable_seed("client dropout", self._settings.seed, self._name, window.number, micro_batch))
        input_ids = batch.input_ids[piece.tokens].to(self._device)
        piece.activations = self._half.embed(input_ids, batch.lengths[piece.sequences])
        message = pb.Activations(
            window=window.number,
            micro_batch=micro_batch,
            values=encode(piece.activations.values, self._settings.wire.activations),
            masked_positions=encode_positions(batch.masked_positions[piece.masked] - piece.first_token, len(input_ids)),
        )
        if piece.activations.row_index is not None:
            message.row_index = encode_row_index(piece.activations.row_index, len(piece.activations.values))
        self._send(pb.ClientMessage(activations=message))

    def _head(self, message: pb.Hidden) -> None:
        window, piece = self._current(), self._piece(message.micro_batch)
        labels = window.batch.labels[piece.masked].to(self._device)
        shape = (len(labels), self._half.widths.hidden)
        hidden = decode(message.values, shape, self._settings.wire.hidden_states, "hidden states", self._device)
        loss_sum, gradient = self._half.head_backward(hidden, labels, 1.0 / window.masked_tokens)
        answer = pb.Gradient(
            window=window.number,
            micro_batch=message.micro_batch,
            hidden=encode(gradient, self._settings.wire.gradients),
            loss_sum=loss_sum,
        )
        self._send(pb.ClientMessage(gradient=answer))

    def _backward(self, message: pb.InputGradient) -> None:
        window, piece = self._current(), self._piece(message.micro_batch)
        if piece.activations is None:
            raise WireError(f"the server sent a second input gradient of micro-batch {message.micro_batch}")
        values = piece.activations.values
        gradient = decode(message.values, values.shape, self._settings.wire.gradients, "input gradient", values.device)
        values.backward(gradient.to(values.dtype))
        piece.activations = None
        window.unfinished -= 1
        if window.unfinished == 0 and exchange_after(self._settings.federation, window.number) == "gradients":
            self._send_half(window.number, self._gradients(), 1.0)

    def _stepped(self) -> None:
        window = self._current()
        masked = len(window.batch.labels)
        self._masked_since_average += masked
        self._masked_seen += masked
        self._tokens_seen += sum(window.batch.lengths)
        exchange = exchange_after(self._settings.federation, window.number)
        if exchange == "gradients":
            return  # The step waits for the sum of all clients' gradients.
        # FedAvg: each client follows the mean loss of its own tokens, not its share of everybody's.
        own_share = window.masked_tokens / max(1, masked)
        for parameter in self._half.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(own_share)
        self._step()
        if exchange == "weights":
            parameters = dict(self._half.named_parameters())
            self._send_half(window.number, parameters, float(max(1, self._masked_since_average)), only=self._exchanged)
        else:
            self._announce()

    def _step(self) -> None:
        optimizer = self._settings.optimizer
        if optimizer.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(self._half.parameters(), optimizer.gradient_clipping)
        for group in self._optimizer.param_groups:
            group["lr"] = optimizer.learning_rate(self._current().number, self._settings.windows)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._next_window = self._current().number + 1

    # -- the half on the wire -------------------------------------------------------------------------------------

    def _gradients(self) -> dict[str, Tensor]:
        return {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in self._half.named_parameters()
        }

    def _send_half(self, window: int, tensors: Mapping[str, Tensor], weight: float, only: Container[str] = ()) -> None:
        chosen = [(name, tensor) for name, tensor in tensors.items() if not only or name in only]
        for chunk in half_chunks(window, chosen, weight):
            self._send(pb.ClientMessage(half=chunk))

    def _receive_half(self, chunk: pb.HalfChunk) -> None:
        complete = self._assembler.add(chunk)
        if complete is None:
            return
        tensors, _ = complete
        parameters = dict(self._half.named_parameters())
        if not self._awaits_initial_half and self._settings.federation.mode == "synchronous":
            for name, gradient in tensors.items():
                parameters[name].grad = gradient.to(self._device)
            self._step()
        else:
            with torch.no_grad():
                for name, weights in tensors.items():
                    parameters[name].copy_(weights)
            self._masked_since_average = 0
        self._awaits_initial_half = False
        self._assembler = self._new_assembler()
        self._announce()

    def _new_assembler(self) -> HalfAssembler:
        shapes = self._exchanged
        if self._awaits_initial_half:
            shapes = {name: tuple(parameter.shape) for name, parameter in self._half.named_parameters()}
        return HalfAssembler(shapes, "the server's half")

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self, window: int) -> None:
        if window != self._next_window:
            raise WireError(f"the server saves window {window}, this client is at {self._next_window}")
        announced = self._window is not None and self._window.number == window
        cursor = self._window.cursor_before if announced and self._window else self._text.state_dict()
        state = {
            "half": self._half.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "cursor": cursor,
            "masked_since_average": self._masked_since_average,
            "masked_seen": self._masked_seen,
            "tokens_seen": self._tokens_seen,
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

    def flops_per_token(self) -> float:
        """Floating-point operations of this half for one token, forward and backward, at the masking share seen."""
        return self._half.flops_per_token(self._masked_seen / max(1, self._tokens_seen))

    def _current(self) -> _Window:
        if self._window is None:
            raise WireError("the server sent a message of a window before this client announced one")
        return self._window

    def _piece(self, micro_batch: int) -> _Piece:
        piece = self._current().pieces.get(micro_batch)
        if piece is None:
            raise WireError(f"the server asks for micro-batch {micro_batch}, in which this client has no piece")
        return piece


def peak_memory_bytes() -> int:
    """Most memory this process has held at once (resident set)."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset"))  # noqa: B009 (typed for this system only)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
