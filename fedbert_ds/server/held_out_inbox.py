"""What clients send in an evaluation: activations of held-out text, and its loss, checked."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch

from fedbert_ds.errors import WireError
from fedbert_ds.server.body.packed_input import BodyInput
from fedbert_ds.server.contract import Arrived, Contract
from fedbert_ds.telemetry.evaluations import HeldOutLoss
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import decode_positions, decode_row_index
from fedbert_ds.wire.messages import check_loss
from fedbert_kernels.encoded import Encoded

PARTS_AHEAD = 2
"""Parts of a client that may wait for the body."""


@dataclass(frozen=True)
class HeldOutPart:
    """A part of a client's held-out text that waits for its forward."""

    client: str
    number: int
    lengths: tuple[int, ...]
    arrived: Arrived

    @property
    def body_input(self) -> BodyInput:
        """As the body takes it; the seed is of no use without dropout."""
        bounds = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        arrived = self.arrived
        return BodyInput([arrived.values], arrived.masked_positions, bounds, arrived.row_index, seed=0)


class HeldOutInbox:
    """Collects one evaluation at a time.

    Every method that takes a message raises WireError for one that is malformed or was not asked
    for, and keeps nothing of it.
    """

    def __init__(self, contract: Contract) -> None:
        self._contract = contract
        self._window = -1
        self._so_far: dict[str, HeldOutLoss] = {}
        """Of each awaited client."""
        self._parts: deque[HeldOutPart] = deque()
        self._losses: dict[str, HeldOutLoss] = {}
        self._bytes = 0

    def take_bytes(self) -> int:
        """Bytes of messages since the last call."""
        taken, self._bytes = self._bytes, 0
        return taken

    def begin(self, window: int) -> None:
        """Start an evaluation of the state before `window`; nobody is asked yet."""
        self._window = window
        self._so_far.clear()
        self._parts.clear()
        self._losses = {}

    def expect(self, client: str) -> None:
        """This client is asked."""
        self._so_far[client] = HeldOutLoss(0.0, 0, (0.0,) * self._contract.num_counts)

    @property
    def awaited(self) -> frozenset[str]:
        """Clients that were asked and have not reported everything."""
        return frozenset(self._so_far)

    @property
    def losses(self) -> dict[str, HeldOutLoss]:
        """Of the clients that have reported everything."""
        return dict(self._losses)

    def take_part(self) -> HeldOutPart | None:
        """The oldest part that waits for its forward, once."""
        return self._parts.popleft() if self._parts else None

    def drop(self, client: str) -> None:
        """A client is gone; what it had not reported to the end does not count."""
        self._so_far.pop(client, None)
        self._parts = deque(part for part in self._parts if part.client != client)

    def receive_activations(self, client: str, message: pb.Activations, tensor: Encoded | WireError | None) -> None:
        """Take the activations of a part."""
        who = f"client {client}: activations of held-out part {message.micro_batch}"
        self._require(client, message.window, who)
        self._bytes += message.ByteSize()
        if sum(part.client == client for part in self._parts) >= PARTS_AHEAD:
            raise WireError(f"{who}: {PARTS_AHEAD} others of it wait already")
        lengths = tuple(message.held_out_lengths)
        tokens, form = sum(lengths), self._contract.activations
        if min(lengths) < 1 or max(lengths) > self._contract.longest_sequence or tokens > form.most_rows:
            raise WireError(f"{who}: sequences of {min(lengths)} to {max(lengths)} tokens, {tokens} together")
        rows, row_index = tokens, None
        if self._contract.is_rows_cut:
            rows = message.values.shape[0] if message.values.shape else 0
            if not 0 < rows <= tokens:
                raise WireError(f"{who}: {rows} rows for {tokens} tokens")
            row_index = decode_row_index(message.row_index, tokens, rows, who)
        if tuple(message.values.shape) != (rows, form.width):
            raise WireError(f"{who}: shape {message.values.shape[:8]} instead of {[rows, form.width]}")
        if isinstance(tensor, WireError):
            raise tensor
        assert tensor is not None
        masked = int.from_bytes(message.masked_positions, "big").bit_count()
        positions = decode_positions(message.masked_positions, tokens, masked, who)
        self._parts.append(HeldOutPart(client, message.micro_batch, lengths, Arrived(tensor, row_index, positions)))

    def receive_loss(self, client: str, message: pb.Evaluated) -> bool:
        """Take the loss of a part; True for a client's last one."""
        who = f"client {client}: held-out loss before window {message.window}"
        self._require(client, message.window, who)
        self._bytes += message.ByteSize()
        check_loss(message.loss_sum, message.masked_tokens, who)
        # A client without held-out text has counted nothing.
        counts = tuple(message.counts) if message.masked_tokens else (0.0,) * self._contract.num_counts
        if len(counts) != self._contract.num_counts or not all(map(math.isfinite, counts)):
            raise WireError(f"{who}: {len(counts)} counts instead of {self._contract.num_counts} numbers")
        loss = self._so_far[client].plus(message.loss_sum, message.masked_tokens, counts)
        self._so_far[client] = loss
        if message.last:
            self._losses[client] = loss
            self.drop(client)
        return message.last

    def _require(self, client: str, window: int, who: str) -> None:
        if client not in self._so_far or window != self._window:
            raise WireError(f"{who}, which was not asked for")
