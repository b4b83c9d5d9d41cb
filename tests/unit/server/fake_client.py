"""An honest client of the protocol for tests of a rank: it answers every server message, without a
model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from zlib import crc32

import torch
from torch import Tensor

from fedbert_ds.client.window_state import WindowState
from fedbert_ds.config import RunConfig
from fedbert_ds.federation.client_update import UpdateAssembler, update_chunks
from fedbert_ds.federation.reference import ReferenceAssembler
from fedbert_ds.federation.strategy import strategy_of_run
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import decode, encode, encode_positions, encode_row_index

WIDTH = 4
HALF = {"table": (3, WIDTH), "head": (2,)}
SEQUENCES = 1000
"""Of a client's text."""
Alter = Callable[[int, pb.ClientMessage], list[pb.ClientMessage]]
"""(number of this message, message) -> what is sent instead."""
GONE = pb.ClientMessage()
"""Sent by an `Alter`, it stands for a connection that breaks."""


def cursor_at(position: int) -> pb.Cursor:
    """Where a client stands that has drawn so many sequences."""
    return pb.Cursor(epoch=0, position=position, sequences=SEQUENCES)


class FakeClient:
    """Answers a server message in `handle`; `alter` may change each answer.

    Sequences, activations and gradients follow from its name and the micro-batch alone. It checks
    that hidden states (unless they are coded) and input gradients are what `FakeEngine` makes of
    its own numbers, whoever shares its micro-batches.
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
        self.missed: list[int] = []
        """Windows that ran without it."""
        self.skipped: list[int] = []
        """Windows of which pieces were skipped."""
        self.updates: list[dict[str, Tensor]] = []
        """What the server sent: initial weights, then combined updates."""
        self.begins: list[pb.Begin] = []
        self.manifests: list[pb.Manifest] = []
        """What it has announced, in order."""
        self.states: dict[int, int] = {}
        """With personal halves: the updates that each saved state has, by window."""
        self.codecs: set[str] = set()
        """Of hidden states."""
        self.hidden_states = 0
        self.finish: pb.Finish | None = None
        self.refusal: str | None = None
        self.may_return = False
        """It may join again, though it was refused."""
        self._config = config
        self._strategy = strategy_of_run(config)
        self._alter = alter
        self._sent = itertools.count()
        self._windows: WindowState[None, pb.Piece] = WindowState(self._strategy, config.federation.staleness)
        self._next_window = self._cursor = 0
        self._gradients: dict[int, Tensor] = {}
        self._assembler = UpdateAssembler(HALF, "the server's update")
        self._reference = ReferenceAssembler(HALF)

    def manifest(self, window: int) -> list[pb.ClientMessage]:
        if window >= self._config.run.windows:
            return []
        self._windows.announce(window, None)
        self._cursor += len(self.lengths)
        masked = [length // 2 for length in self.lengths]
        manifest = pb.Manifest(window=window, lengths=self.lengths, masked=masked, cursor=cursor_at(self._cursor))
        self.manifests.append(manifest)
        return [pb.ClientMessage(manifest=manifest)]

    def handle(self, message: pb.ServerMessage) -> list[pb.ClientMessage]:
        answers: list[pb.ClientMessage] = []
        match message.WhichOneof("body"):
            case "begin":
                answers += self._begin(message.begin)
            case "plan":
                answers += self._plan(message.plan)
            case "open":
                self._windows.open(message.open.window, message.open.micro_batch)
                answers += self._activations_due()
            case "evaluate":
                answers += self._evaluate(message.evaluate.window)
            case "hidden" if message.hidden.held_out:
                answers += self._held_out_loss(message.hidden)
            case "hidden":
                answers.append(self._gradient(message.hidden))
            case "input_gradient":
                done = message.input_gradient
                self._check_input_gradient(done)
                if self._windows.finish(done.window, done.micro_batch):
                    answers += self._finish_window(done.window)
            case "skipped":
                self.skipped.append(message.skipped.window)
                if self._windows.skip(message.skipped.window, message.skipped.micro_batches):
                    answers += self._finish_window(message.skipped.window)
            case "reference":
                if (reference := self._reference.add(message.reference)) is not None:
                    self.updates.append(reference.weights)
                    answers += self.manifest(self._next_window)
            case "update":
                if (complete := self._assembler.add(message.update)) is not None:
                    answers += self._take_update(message.update.window, dict(complete))
            case "save":
                self.states[message.save.window] = len(self.updates)
                saved = pb.Saved(window=message.save.window, flops_per_token=7.0)
                answers.append(pb.ClientMessage(saved=saved))
            case "update_request":
                answers += self._own_update(message.update_request.window)
            case "finish":
                self.finish = message.finish
            case "refused":
                self.refusal, self.may_return = message.refused.reason, message.refused.may_return
        return [altered for answer in answers for altered in self._alter(next(self._sent), answer)]

    def _evaluate(self, window: int) -> list[pb.ClientMessage]:
        """Each of its sequences is a part, two of them on their way."""
        if self._strategy.trains_alone:
            return [self._held_out_report(window, number) for number in range(len(self.lengths))]
        return [self._held_out_part(window, number) for number in range(min(2, len(self.lengths)))]

    def _held_out_part(self, window: int, number: int) -> pb.ClientMessage:
        tokens = self.lengths[number]
        message = pb.Activations(
            window=window,
            micro_batch=number,
            values=encode(self.numbers(-1 - number, "held out", tokens), self._config.wire.activations),
            masked_positions=encode_positions(torch.arange(tokens // 2), tokens),
            held_out_lengths=[tokens],
        )
        if self._config.cut == "rows":
            message.row_index = encode_row_index(torch.arange(tokens), tokens)
        return pb.ClientMessage(activations=message)

    def _held_out_loss(self, hidden: pb.Hidden) -> list[pb.ClientMessage]:
        tokens = self.lengths[hidden.micro_batch]
        theirs = decode(hidden.values, (tokens // 2, WIDTH), hidden.values.codec, "hidden")
        if hidden.values.codec == "fp32":
            assert torch.equal(theirs, 2.0 * self.numbers(-1 - hidden.micro_batch, "held out", tokens)[: tokens // 2])
        following = hidden.micro_batch + 2
        sent = [self._held_out_part(hidden.window, following)] if following < len(self.lengths) else []
        return [*sent, self._held_out_report(hidden.window, hidden.micro_batch)]

    def _held_out_report(self, window: int, number: int) -> pb.ClientMessage:
        """A loss of 3 nats a masked token, and of the window's number in all."""
        masked = self.lengths[number] // 2
        is_last = number == len(self.lengths) - 1
        # Something that tells windows apart, where there is a masked token to have lost it on.
        loss = 3.0 * masked + window * (number == 0)
        return pb.ClientMessage(
            evaluated=pb.Evaluated(window=window, loss_sum=loss, masked_tokens=masked, last=is_last)
        )

    def numbers(self, micro_batch: int, what: str, count: int) -> Tensor:
        # The same in every process, unlike the hash of a text.
        random = torch.Generator().manual_seed(crc32(repr((self.name, micro_batch, what)).encode()))
        return torch.randn(count, WIDTH, generator=random)

    def _begin(self, begin: pb.Begin) -> list[pb.ClientMessage]:
        self.begins.append(begin)
        self._next_window = begin.next_window
        self._cursor = begin.cursor.position
        self._windows = WindowState(self._strategy, self._config.federation.staleness, begin.window)
        self._miss(begin.window, begin.next_window)
        self._gradients.clear()
        self._assembler = UpdateAssembler(HALF, "the server's update")
        self._reference = ReferenceAssembler(HALF)
        begun = pb.ClientMessage(begun=pb.Begun(attempt=begin.attempt))
        if begin.reference:
            return [begun]
        if self._strategy.halves_are_personal:
            assert begin.window in self.states, f"{self.name} has no state of window {begin.window}"
        return [begun, *self.manifest(begin.next_window)]

    def _plan(self, plan: pb.Plan) -> list[pb.ClientMessage]:
        if plan.pieces:
            self._windows.plan(plan.window, {piece.micro_batch: piece for piece in plan.pieces})
        answers = self.manifest(plan.next_window)
        self._miss(plan.window + bool(plan.pieces), plan.next_window)
        return answers + self._activations_due()

    def _miss(self, first: int, next_window: int) -> None:
        self.missed += range(first, next_window)
        self._windows.miss(first, next_window)

    def _activations_due(self) -> list[pb.ClientMessage]:
        if self._strategy.trains_alone:
            return [message for window, _ in self._windows.take_sendable() for message in self._train_alone(window)]
        return [self._activations(window, micro_batch) for window, micro_batch in self._windows.take_sendable()]

    def _train_alone(self, window: int) -> list[pb.ClientMessage]:
        """A report for each sequence, 2 nats a masked token."""
        self._windows.finish(window, 0)
        masked = [length // 2 for length in self.lengths]
        parts = [
            pb.Trained(window=window, loss_sum=2.0 * count, masked_tokens=count, last=number == len(masked) - 1)
            for number, count in enumerate(masked)
        ]
        return [pb.ClientMessage(trained=part) for part in parts] + self._finish_window(window)

    def _finish_window(self, window: int) -> list[pb.ClientMessage]:
        match self._strategy.exchange_after(window):
            case "gradients":
                return self._own_update(window)
            case "weights":
                self.windows_stepped.append(window)
                return self._own_update(window)
            case "nothing":
                self.windows_stepped.append(window)
                self._windows.apply(window)
                return self._activations_due()

    def _take_update(self, window: int, update: dict[str, Tensor]) -> list[pb.ClientMessage]:
        self._assembler = UpdateAssembler(HALF, "the server's update")
        self.updates.append(update)
        if self._strategy.exchange_after(window) == "gradients":
            self.windows_stepped.append(window)
        self._windows.apply(window)
        return self._activations_due()

    def _lengths(self, piece: pb.Piece) -> tuple[int, ...]:
        return self.lengths[piece.first_sequence : piece.first_sequence + piece.num_sequences]

    def _positions(self, piece: pb.Piece) -> Tensor:
        """The last half of each sequence is masked."""
        positions, first = [], 0
        for length in self._lengths(piece):
            positions += range(first + length - length // 2, first + length)
            first += length
        return torch.tensor(positions, dtype=torch.int64)

    def _per_token(self, piece: pb.Piece) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values as sent, the same for each token, and the row index of cut: rows (every other word
        is the same).
        """
        tokens = sum(self._lengths(piece))
        if self._config.cut != "rows":
            values = self.numbers(piece.micro_batch, "activations", tokens)
            return values, values, None
        index = torch.tensor([0 if token % 2 else token // 2 for token in range(tokens)])
        rows = self.numbers(piece.micro_batch, "rows", int(index.max()) + 1)
        return rows, rows[index], index

    def _activations(self, window: int, micro_batch: int) -> pb.ClientMessage:
        piece = self._windows.piece(window, micro_batch)
        values, _, index = self._per_token(piece)
        message = pb.Activations(
            window=window,
            micro_batch=micro_batch,
            values=encode(values, self._config.wire.activations),
            masked_positions=encode_positions(self._positions(piece), sum(self._lengths(piece))),
        )
        if index is not None:
            message.row_index = encode_row_index(index, len(values))
        return pb.ClientMessage(activations=message)

    def _gradient(self, message: pb.Hidden) -> pb.ClientMessage:
        number, piece = message.micro_batch, self._windows.piece(message.window, message.micro_batch)
        positions, codec = self._positions(piece), self._config.wire.hidden_states
        hidden = decode(message.values, (len(positions), WIDTH), codec, "hidden states")
        if codec == "fp32":
            _, per_token, _ = self._per_token(piece)
            assert torch.equal(hidden, 2.0 * per_token[positions]), f"{self.name}: hidden states of {number}"
        self.hidden_states += len(hidden)
        self.codecs.add(message.values.codec)
        gradient = self._gradients[number] = self.numbers(number, "gradient", len(positions))
        frame = encode(gradient, self._config.wire.gradients)
        return pb.ClientMessage(
            gradient=pb.Gradient(window=message.window, micro_batch=number, hidden=frame, loss_sum=2.0 * len(positions))
        )

    def _check_input_gradient(self, message: pb.InputGradient) -> None:
        piece = self._windows.piece(message.window, message.micro_batch)
        positions = self._positions(piece)
        values, _, index = self._per_token(piece)
        expected = torch.zeros_like(values)
        where = positions if index is None else index[positions]
        expected.index_add_(0, where, 2.0 * self._gradients.pop(message.micro_batch))
        got = decode(message.values, values.shape, self._config.wire.gradients, "input gradient")
        torch.testing.assert_close(got, expected)

    def _own_update(self, window: int) -> list[pb.ClientMessage]:
        """Every value is the length of this client's name."""
        tensors = {name: torch.full(shape, float(len(self.name))) for name, shape in HALF.items()}
        return [pb.ClientMessage(update=chunk) for chunk in update_chunks(window, tensors.items())]
