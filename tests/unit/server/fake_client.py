"""An honest client of the protocol for tests of a rank: it answers every server message, without a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fedbert_ds.config import RunConfig
from fedbert_ds.federation.client_update import UpdateAssembler, update_chunks
from fedbert_ds.federation.strategy import exchange_after
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import decode, encode, encode_positions, encode_row_index

WIDTH = 4
HALF = {"table": (3, WIDTH), "head": (2,)}
Alter = Callable[[int, pb.ClientMessage], list[pb.ClientMessage]]
"""(number of this message, message) -> what is sent instead."""
GONE = pb.ClientMessage()
"""Sent by an `Alter`, it stands for a connection that breaks."""


class FakeClient:
    """An honest client of the protocol: `handle` answers a server message, but for what `alter` makes of the answer.

    Sequences, activations and gradients follow from its name and the window alone. It checks that hidden states and
    input gradients are what `FakeEngine` makes of its own numbers, whoever shares its micro-batches.
    """

    def __init__(
        self,
        name: str,
        config: RunConfig,
        lengths: tuple[int, ...] = (3, 5, 2, 4),
        alter: Alter = lambda number, message: [message],
    ) -> None:
        self.name = name
        self.lengths = lengths
        self.windows_stepped: list[int] = []
        """Windows whose step its half has taken, in order."""
        self.passed_over: list[int] = []
        self.skipped: list[int] = []
        self.halves: list[dict[str, Tensor]] = []
        self.hidden_states = 0
        self.finish: pb.Finish | None = None
        self.refusal: str | None = None
        self._config = config
        self._alter = alter
        self._sent = itertools.count()
        self._ready_for = 0
        """The first window whose step, exchange included, its half has not taken."""
        self._window_of: dict[int, int] = {}
        self._pieces: dict[int, pb.Piece] = {}
        self._unfinished: dict[int, set[int]] = {}
        self._opened: list[int] = []
        self._gradients: dict[int, Tensor] = {}
        self._assembler = UpdateAssembler(HALF, "the server's update")

    def manifest(self, window: int) -> list[pb.ClientMessage]:
        if window >= self._config.run.windows:
            return []
        masked = [length // 2 for length in self.lengths]
        return [pb.ClientMessage(manifest=pb.Manifest(window=window, lengths=self.lengths, masked=masked))]

    def handle(self, message: pb.ServerMessage) -> list[pb.ClientMessage]:
        answers: list[pb.ClientMessage] = []
        match message.WhichOneof("body"):
            case "plan":
                answers += self._plan(message.plan)
            case "open":
                self._opened.append(message.open.micro_batch)
                answers += self._activations_due()
            case "hidden":
                answers.append(self._gradient(message.hidden))
            case "input_gradient":
                self._check_input_gradient(message.input_gradient)
                answers += self._finish_pieces(message.input_gradient.window, [message.input_gradient.micro_batch])
            case "skipped":
                self.skipped.append(message.skipped.window)
                answers += self._finish_pieces(message.skipped.window, message.skipped.micro_batches)
            case "update":
                if (complete := self._assembler.add(message.update)) is not None:
                    answers += self._take_half(message.update.window, complete[0])
            case "save":
                answers.append(pb.ClientMessage(saved=pb.Saved(window=message.save.window, flops_per_token=7.0)))
            case "update_request":
                answers += self._half(message.update_request.window, weight=1.0)
            case "finish":
                self.finish = message.finish
            case "refused":
                self.refusal = message.refused.reason
        return [altered for answer in answers for altered in self._alter(next(self._sent), answer)]

    def numbers(self, micro_batch: int, what: str, count: int) -> Tensor:
        random = torch.Generator().manual_seed(hash((self.name, micro_batch, what)) % 2**31)
        return torch.randn(count, WIDTH, generator=random)

    def own_half(self) -> dict[str, Tensor]:
        return {name: torch.full(shape, float(len(self.name))) for name, shape in HALF.items()}

    def _plan(self, plan: pb.Plan) -> list[pb.ClientMessage]:
        for piece in plan.pieces:
            self._pieces[piece.micro_batch] = piece
            self._window_of[piece.micro_batch] = plan.window
        self._unfinished[plan.window] = {piece.micro_batch for piece in plan.pieces}
        answers = self.manifest(plan.next_window)
        if not plan.pieces:
            self.passed_over += range(plan.window, plan.next_window)
            if self._config.federation.mode == "parallel":
                self._ready_for = max(self._ready_for, plan.next_window)
        return answers + self._activations_due()

    def _activations_due(self) -> list[pb.ClientMessage]:
        """What was asked for and its half is ready for."""
        horizon = self._ready_for + self._config.federation.staleness
        due = [number for number in self._opened if self._window_of[number] <= horizon]
        self._opened = [number for number in self._opened if number not in due]
        return [self._activations(number) for number in due]

    def _finish_pieces(self, window: int, micro_batches: Iterable[int]) -> list[pb.ClientMessage]:
        self._opened = [number for number in self._opened if number not in micro_batches]
        unfinished = self._unfinished[window]
        unfinished -= set(micro_batches)
        if unfinished:
            return []
        if self._config.federation.mode == "synchronous":
            return self._half(window, weight=1.0)
        self.windows_stepped.append(window)
        if exchange_after(self._config.federation, window) == "weights":
            return self._half(window, weight=float(len(self.name)))
        self._ready_for = max(self._ready_for, window + 1)
        return self._activations_due()

    def _take_half(self, window: int, half: dict[str, Tensor]) -> list[pb.ClientMessage]:
        self._assembler = UpdateAssembler(HALF, "the server's update")
        self.halves.append(half)
        if len(self.halves) == 1:
            return self.manifest(0)
        if self._config.federation.mode == "synchronous":
            self.windows_stepped.append(window)
        self._ready_for = max(self._ready_for, window + 1)
        return self._activations_due()

    def _lengths(self, micro_batch: int) -> tuple[int, ...]:
        piece = self._pieces[micro_batch]
        return self.lengths[piece.first_sequence : piece.first_sequence + piece.num_sequences]

    def _positions(self, micro_batch: int) -> Tensor:
        """The last half of each sequence is masked."""
        positions, first = [], 0
        for length in self._lengths(micro_batch):
            positions += range(first + length - length // 2, first + length)
            first += length
        return torch.tensor(positions, dtype=torch.int64)

    def _per_token(self, micro_batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values as sent, the same for each token, and the row index of cut: rows (every other word is the same)."""
        tokens = sum(self._lengths(micro_batch))
        if self._config.cut != "rows":
            values = self.numbers(micro_batch, "activations", tokens)
            return values, values, None
        index = torch.tensor([0 if token % 2 else token // 2 for token in range(tokens)])
        rows = self.numbers(micro_batch, "rows", int(index.max()) + 1)
        return rows, rows[index], index

    def _activations(self, micro_batch: int) -> pb.ClientMessage:
        values, _, index = self._per_token(micro_batch)
        message = pb.Activations(
            window=self._window_of[micro_batch],
            micro_batch=micro_batch,
            values=encode(values, self._config.wire.activations),
            masked_positions=encode_positions(self._positions(micro_batch), sum(self._lengths(micro_batch))),
        )
        if index is not None:
            message.row_index = encode_row_index(index, len(values))
        return pb.ClientMessage(activations=message)

    def _gradient(self, message: pb.Hidden) -> pb.ClientMessage:
        number, positions = message.micro_batch, self._positions(message.micro_batch)
        hidden = decode(message.values, (len(positions), WIDTH), self._config.wire.hidden_states, "hidden states")
        _, per_token, _ = self._per_token(number)
        assert torch.equal(hidden, 2.0 * per_token[positions]), f"{self.name}: hidden states of micro-batch {number}"
        self.hidden_states += len(hidden)
        gradient = self._gradients[number] = self.numbers(number, "gradient", len(positions))
        frame = encode(gradient, self._config.wire.gradients)
        return pb.ClientMessage(
            gradient=pb.Gradient(window=message.window, micro_batch=number, hidden=frame, loss_sum=2.0 * len(positions))
        )

    def _check_input_gradient(self, message: pb.InputGradient) -> None:
        number, positions = message.micro_batch, self._positions(message.micro_batch)
        values, _, index = self._per_token(number)
        expected = torch.zeros_like(values)
        where = positions if index is None else index[positions]
        expected.index_add_(0, where, 2.0 * self._gradients.pop(number))
        got = decode(message.values, values.shape, self._config.wire.gradients, "input gradient")
        torch.testing.assert_close(got, expected)

    def _half(self, window: int, weight: float) -> list[pb.ClientMessage]:
        return [pb.ClientMessage(update=chunk) for chunk in update_chunks(window, self.own_half().items(), weight)]
