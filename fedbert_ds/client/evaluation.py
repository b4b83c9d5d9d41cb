"""A client's part in an evaluation: the loss of its held-out text, part by part, moving nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fedbert_ds.client.whole_window import bounds, parts_of
from fedbert_ds.config import WireSection
from fedbert_ds.data.masking import Batch
from fedbert_ds.errors import WireError
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import decode, encode, encode_positions, encode_row_index

PARTS_ON_THEIR_WAY = 2
"""One crosses the wire while the body computes another."""


class HeldOutEvaluation:
    """Sends parts of the held-out text through the body and reports their loss.

    `text` None: this client holds nothing out. A part has at most `capacity` tokens, or is one
    sequence. Neither dropout nor gradients: weights, optimizer and random numbers stay as they are.
    """

    def __init__(
        self,
        half: ClientHalf,
        text: Batch | None,
        wire: WireSection,
        capacity: int,
        device: torch.device,
        send: Callable[[pb.ClientMessage], None],
    ) -> None:
        self._half = half
        self._parts = [] if text is None else [part for _, part in parts_of(text, capacity)]
        self._wire = wire
        self._device = device
        self._send = send
        self._window = -1
        self._next_part = 0
        self._awaited: deque[int] = deque()
        """Parts whose hidden states are not here yet; they come in this order."""

    def cancel(self) -> None:
        """Forget the evaluation that is under way."""
        self._window = -1
        self._awaited.clear()

    def begin(self, window: int) -> None:
        """Evaluate the half as it is before `window`."""
        self.cancel()
        self._window, self._next_part = window, 0
        if not self._parts:
            self._send(pb.ClientMessage(evaluated=pb.Evaluated(window=window, last=True)))
        elif self._half.cut == "whole":
            for number, part in enumerate(self._parts):
                with self._without_dropout():
                    hidden = self._half.whole_hidden(*self._inputs(part))
                self._report(number, hidden)
        else:
            for _ in range(PARTS_ON_THEIR_WAY):
                self._send_part()

    def hidden(self, message: pb.Hidden) -> None:
        """The body's hidden states of the oldest part on its way."""
        if message.window != self._window or not self._awaited or message.micro_batch != self._awaited[0]:
            raise WireError(f"the server sent hidden states of held-out part {message.micro_batch}, unasked")
        number = self._awaited.popleft()
        shape = (len(self._parts[number].labels), self._half.widths.hidden)
        hidden = decode(message.values, shape, self._wire.hidden_states, "hidden states", self._device)
        # The body computes the next part while the head reads this one.
        self._send_part()
        self._report(number, hidden)

    def _send_part(self) -> None:
        """Send the activations of the next part, if one is left."""
        if self._next_part == len(self._parts):
            return
        number = self._next_part
        part = self._parts[number]
        self._next_part += 1
        self._awaited.append(number)
        with self._without_dropout():
            ids, lengths, _, token_types = self._inputs(part)
            activations = self._half.embed(ids, lengths, token_types)
        values, row_index = activations.values, activations.row_index
        message = pb.Activations(
            window=self._window,
            micro_batch=number,
            values=encode(values, self._wire.activations, compressed=self._wire.is_compressed),
            masked_positions=encode_positions(part.masked_positions, len(part.input_ids)),
            held_out_lengths=part.lengths,
        )
        if row_index is not None:
            message.row_index = encode_row_index(row_index, len(values))
        self._send(pb.ClientMessage(activations=message))

    def _inputs(self, part: Batch) -> tuple[Tensor, list[int], Tensor, Tensor | None]:
        """As `ClientHalf.whole_hidden` takes a part."""
        kinds = None if part.token_types is None else part.token_types.to(self._device)
        return part.input_ids.to(self._device), part.lengths, part.masked_positions.to(self._device), kinds

    def _report(self, number: int, hidden: Tensor) -> None:
        """Tell the loss of a part, by its hidden states [m, W_out], and a task's counts."""
        part = self._parts[number]
        labels = part.labels.to(self._device)
        with self._without_dropout():
            loss_sum = self._half.head_loss(hidden, labels)
            counts = self._half.head_counts(hidden, labels, bounds(part)[1])
        report = pb.Evaluated(
            window=self._window,
            loss_sum=loss_sum,
            masked_tokens=len(labels),
            last=number == len(self._parts) - 1,
            counts=counts,
        )
        self._send(pb.ClientMessage(evaluated=report))

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        self._half.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._half.train()
