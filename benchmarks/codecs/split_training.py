"""A client half and a body in one process, the wire's own frames between: no network, no DeepSpeed.

A synchronous run equals centralized training, so one client and one message a window show what
codecs do to learning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedbert_ds.config import Codec, OptimizerSection, WireSection
from fedbert_ds.data.masking import Batch
from fedbert_ds.model.body import Body
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.model.optimizer import build_optimizer
from fedbert_ds.seeding import stable_seed
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import decode, encode, encode_positions, encode_row_index


@dataclass(frozen=True)
class Crossed:
    """What one window was, and what crossed the wire for it."""

    loss_sum: float
    """Cross-entropies of masked tokens before the step, nats."""
    tokens: int
    masked: int
    bytes_up: int
    bytes_down: int


class RowFeedback:
    """Error feedback for the word table: a row's rounding error is added when it is next sent.

    Only the client can keep it, for only it knows which row is which. Tokens and hidden states have
    no such identity.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        self._owed = torch.zeros(vocabulary, width)

    def before(self, rows: Tensor, ids: Tensor) -> Tensor:
        """The rows [R, W] of `ids` [R], with what is owed to them."""
        return rows + self._owed[ids]

    def after(self, wanted: Tensor, sent: Tensor, ids: Tensor) -> None:
        """Remember what the codec left out."""
        self._owed[ids] = wanted - sent


class SplitTrainer:
    """Trains client half and body, each with its own optimizer, clipped by one norm."""

    def __init__(
        self,
        half: ClientHalf,
        body: Body,
        wire: WireSection,
        optimizer: OptimizerSection,
        windows: int,
        seed: int,
        *,
        stochastic: bool = False,
        centred: bool = False,
        updates: Codec = "fp32",
        feedback: RowFeedback | None = None,
    ) -> None:
        self.half, self.body = half.train(), body.train()
        self._wire, self._section, self._windows, self._seed = wire, optimizer, windows, seed
        self._stochastic, self._centred, self._feedback, self._updates = stochastic, centred, feedback, updates
        self._optimizers = [build_optimizer(list(part.named_parameters()), optimizer) for part in (half, body)]

    def train_window(self, window: int, batch: Batch) -> Crossed:
        """One message each way and back, then a step of both halves."""
        wire, widths, masked = self._wire, self.half.widths, len(batch.labels)
        activations = self.half.embed(batch.input_ids, batch.lengths)
        values, row_index = activations.values, activations.row_index
        frame, received = self._send_activations(values, row_index, batch.input_ids)
        up = [manifest(window, batch), activations_message(window, batch, frame, row_index, len(values))]

        inputs = received.requires_grad_()
        index = None if row_index is None else row_index.long()
        hidden = self.body(inputs, batch.masked_positions, cu_seqlens_of(batch.lengths), index)
        # What all hidden states share is most of them: sent apart, it leaves the codec less to
        # round.
        shared = hidden.detach().mean(dim=0) * float(self._centred)
        frame = encode(hidden - shared, wire.hidden_states, compressed=wire.is_compressed)
        down = [pb.ServerMessage(hidden=pb.Hidden(window=window, values=frame, masked_tokens=masked))]
        seen = decode(frame, (masked, widths.hidden), wire.hidden_states, "hidden states") + shared
        loss_sum, gradient = self.half.head_backward(seen, batch.labels, 1.0 / max(1, masked))

        frame = encode(gradient, wire.gradients, self._rounding_seed("hidden", window), compressed=wire.is_compressed)
        up.append(pb.ClientMessage(gradient=pb.Gradient(window=window, hidden=frame, loss_sum=loss_sum)))
        hidden.backward(decode(frame, hidden.shape, wire.gradients, "gradient"))
        assert inputs.grad is not None
        frame = encode(inputs.grad, wire.gradients, self._rounding_seed("input", window), compressed=wire.is_compressed)
        down.append(pb.ServerMessage(input_gradient=pb.InputGradient(window=window, values=frame)))
        values.backward(decode(frame, values.shape, wire.gradients, "input gradient"))
        self._exchange_update()
        self._step(window)
        down += control(window, batch)
        sizes = [sum(message.ByteSize() for message in messages) for messages in (up, down)]
        return Crossed(loss_sum, len(batch.input_ids), masked, *sizes)

    @torch.no_grad()
    def loss(self, batches: Sequence[Batch]) -> float:
        """Nats per masked token of the model without codecs, as a user gets it."""
        self.half.eval(), self.body.eval()
        total = 0.0
        for batch in batches:
            activations = self.half.embed(batch.input_ids, batch.lengths)
            index = None if activations.row_index is None else activations.row_index.long()
            hidden = self.body(activations.values, batch.masked_positions, cu_seqlens_of(batch.lengths), index)
            total += self.half.head_loss(hidden, batch.labels)
        self.half.train(), self.body.train()
        return total / sum(len(batch.labels) for batch in batches)

    def _send_activations(
        self, values: Tensor, row_index: Tensor | None, input_ids: Tensor
    ) -> tuple[pb.TensorFrame, Tensor]:
        wanted, ids = values.detach(), None
        if self._feedback is not None and row_index is not None:
            ids = input_ids.new_empty(len(values)).scatter_(0, row_index.long(), input_ids)
            wanted = self._feedback.before(wanted, ids)
        frame = encode(wanted, self._wire.activations, compressed=self._wire.is_compressed)
        received = decode(frame, values.shape, self._wire.activations, "activations")
        if self._feedback is not None and ids is not None:
            self._feedback.after(wanted, received, ids)
        return frame, received

    def _exchange_update(self) -> None:
        """The half's gradients go up and their sum comes down; bytes are counted elsewhere."""
        for parameter in self.half.parameters():
            for _ in ("up", "down") if self._updates != "fp32" and parameter.dim() == 2 else ():
                assert parameter.grad is not None
                frame = encode(parameter.grad, self._updates)
                parameter.grad = decode(frame, parameter.shape, self._updates, "half")

    def _rounding_seed(self, what: str, window: int) -> int | None:
        return stable_seed("rounding", what, self._seed, window) if self._stochastic else None

    def _step(self, window: int) -> None:
        if self._section.gradient_clipping:
            parameters = [*self.half.parameters(), *self.body.parameters()]
            torch.nn.utils.clip_grad_norm_(parameters, self._section.gradient_clipping)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._section.learning_rate(window, self._windows)
            optimizer.step()
            optimizer.zero_grad()


def manifest(window: int, batch: Batch) -> pb.ClientMessage:
    """Sizes of the window's sequences."""
    bounds = torch.tensor([0, *batch.lengths]).cumsum(0)
    masked = torch.searchsorted(batch.masked_positions, bounds).diff().tolist()
    return pb.ClientMessage(manifest=pb.Manifest(window=window, lengths=batch.lengths, masked=masked))


def activations_message(
    window: int, batch: Batch, frame: pb.TensorFrame, row_index: Tensor | None, num_rows: int
) -> pb.ClientMessage:
    """The whole window in one message, as a client sends it."""
    message = pb.Activations(
        window=window, values=frame, masked_positions=encode_positions(batch.masked_positions, len(batch.input_ids))
    )
    if row_index is not None:
        message.row_index = encode_row_index(row_index, num_rows)
    return pb.ClientMessage(activations=message)


def control(window: int, batch: Batch) -> list[pb.ServerMessage]:
    """What else the server says in a window."""
    piece = pb.Piece(num_sequences=len(batch.lengths))
    return [
        pb.ServerMessage(plan=pb.Plan(window=window, pieces=[piece], next_window=window + 1)),
        pb.ServerMessage(open=pb.Open(window=window)),
    ]


def cu_seqlens_of(lengths: Sequence[int]) -> Tensor:
    """Bounds [sequences + 1] int32 of packed sequences of these lengths."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
