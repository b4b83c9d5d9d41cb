"""A client: its machine, which keeps states, and its process, which trains with whole numbers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np
import torch
from simulation import arithmetic
from simulation.link import Stream

from fedbert_ds.client.window_state import WindowState
from fedbert_ds.federation.client_update import update_chunks
from fedbert_ds.federation.reference import ReferenceAssembler
from fedbert_ds.federation.strategy import strategy_of_run
from fedbert_ds.server.network.events import JoinAbandoned, JoinAsked
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.messages import PROTOCOL

if TYPE_CHECKING:
    from simulation.play import Play

HALF = "half"
SEQUENCES = 1 << 20
"""Of a client's text."""


class Process:
    """A client's process, from its first window to its end. It answers as `ClientTrainer` does."""

    def __init__(self, machine: Machine, tokens: int) -> None:
        config = machine.play.config
        self.machine, self.name, self.tokens = machine, machine.name, tokens
        self.stream: Stream | None = None
        self.half = self.common = 0.0
        """The client model, and what it was after the last exchange."""
        self.gradient = 0
        """Sum over the sequences of the windows since the last step or update."""
        self.finish: pb.Finish | None = None
        self._config = config
        self._strategy = strategy_of_run(config)
        self._windows: WindowState[range, pb.Piece] = WindowState(self._strategy, config.federation.staleness)
        self._next_window = self._cursor = 0
        self._sent: dict[int, tuple[list[int], float]] = {}
        """Activations by micro-batch, and the client model they came from."""
        self._answered: dict[int, list[int]] = {}
        self._gradients: dict[int, int] = {}
        """Sums of the client model's gradients, by window."""
        self._awaits_reference = False
        self._assembler = ReferenceAssembler({HALF: (1,)})

    def handle(self, message: pb.ServerMessage) -> None:
        """Answer a message of the rank."""
        assert self.stream is not None
        for answer in self._answers(message):
            self.stream.answer(answer)

    def _answers(self, message: pb.ServerMessage) -> Iterator[pb.ClientMessage]:
        match message.WhichOneof("body"):
            case "begin":
                yield from self._begin(message.begin)
            case "plan":
                yield from self._plan(message.plan)
            case "open":
                self._windows.open(message.open.window, message.open.micro_batch)
                yield from self._due()
            case "hidden":
                yield self._gradient(message.hidden)
            case "input_gradient":
                yield from self._take_input_gradient(message.input_gradient)
            case "skipped":
                for number in message.skipped.micro_batches:
                    self._sent.pop(number, None)
                    self._answered.pop(number, None)
                if self._windows.skip(message.skipped.window, message.skipped.micro_batches):
                    yield from self._finish_window(message.skipped.window)
            case "update":
                yield from self._update(message.update)
            case "reference":
                if (reference := self._assembler.add(message.reference)) is not None:
                    assert self._awaits_reference
                    self._awaits_reference = False
                    self.half = self.common = float(reference.weights[HALF][0])
                    yield from self._announce()
            case "save":
                if self._strategy.needs_every_window:
                    assert message.save.window <= self._windows.applied, "saved before the half has every step"
                self.machine.states[message.save.window] = self.half, self.common
                yield pb.ClientMessage(saved=pb.Saved(window=message.save.window))
            case "update_request":
                yield from self._chunks(message.update_request.window, self.half, 1.0)
            case "finish":
                self.finish = message.finish
                self.machine.finished(message.finish.complete)
            case "refused":
                self.machine.refused(message.refused.reason, message.refused.may_return)
            case other:
                raise AssertionError(f"a message of kind {other}")

    def _begin(self, begin: pb.Begin) -> Iterator[pb.ClientMessage]:
        assert begin.reference or begin.window <= begin.next_window
        self._windows = WindowState(self._strategy, self._config.federation.staleness, begin.window)
        self._windows.miss(begin.window, begin.next_window)
        self._next_window, self._cursor = begin.next_window, begin.cursor.position
        self._sent.clear()
        self._answered.clear()
        self._gradients.clear()
        self._awaits_reference = begin.reference
        yield pb.ClientMessage(begun=pb.Begun(attempt=begin.attempt))
        if begin.reference:
            if self._strategy.halves_are_personal and begin.next_window:
                self.machine.play.is_anew = True
            return
        if self._strategy.halves_are_personal:
            assert begin.window in self.machine.states, f"{self.name} has no state of window {begin.window}"
            self.half, self.common = self.machine.states[begin.window]
        yield from self._announce()

    def _announce(self) -> Iterator[pb.ClientMessage]:
        window = self._next_window
        if window >= self._config.run.windows:
            return
        places = arithmetic.batch(self.name, self._cursor, self.tokens)
        texts = [arithmetic.text(self.name, place) for place in places]
        self._windows.announce(window, places)
        self._cursor = places.stop
        self.machine.play.batches[self.name, window] = places
        yield pb.ClientMessage(
            manifest=pb.Manifest(
                window=window,
                lengths=[text.length for text in texts],
                masked=[text.masked for text in texts],
                cursor=pb.Cursor(epoch=0, position=self._cursor, sequences=SEQUENCES),
            )
        )

    def _plan(self, plan: pb.Plan) -> Iterator[pb.ClientMessage]:
        assert plan.next_window > plan.window
        if plan.pieces:
            self._windows.plan(plan.window, {piece.micro_batch: piece for piece in plan.pieces})
        self._next_window = plan.next_window
        yield from self._announce()
        self._windows.miss(plan.window + bool(plan.pieces), plan.next_window)
        yield from self._due()

    def _due(self) -> Iterator[pb.ClientMessage]:
        for window, micro_batch in self._windows.take_sendable():
            if self._strategy.trains_alone:
                yield from self._train_alone(window, micro_batch)
                continue
            texts = self._texts(window, self._windows.piece(window, micro_batch))
            values = [arithmetic.activation(text.number, self.half) for text in texts]
            self._sent[micro_batch] = values, self.half
            shape = [sum(text.length for text in texts), 1]
            frame = pb.TensorFrame(shape=shape, payload=arithmetic.packed(values))
            activations = pb.Activations(window=window, micro_batch=micro_batch, values=frame)
            yield pb.ClientMessage(activations=activations)

    def _texts(self, window: int, piece: pb.Piece) -> list[arithmetic.Text]:
        places = self._windows.content(window)[piece.first_sequence : piece.first_sequence + piece.num_sequences]
        assert len(places) == piece.num_sequences, "sequences that this client does not have"
        return [arithmetic.text(self.name, place) for place in places]

    def _gradient(self, message: pb.Hidden) -> pb.ClientMessage:
        texts = self._texts(message.window, self._windows.piece(message.window, message.micro_batch))
        _, half = self._sent[message.micro_batch]
        states = arithmetic.unpacked(message.values.payload)
        answers = [
            arithmetic.gradient(text.number, half, state, message.masked_tokens)
            for text, state in zip(texts, states, strict=True)
        ]
        self._answered[message.micro_batch] = answers
        loss = sum(arithmetic.loss(state, text.masked) for text, state in zip(texts, states, strict=True))
        frame = pb.TensorFrame(shape=[sum(text.masked for text in texts), 1], payload=arithmetic.packed(answers))
        return pb.ClientMessage(
            gradient=pb.Gradient(window=message.window, micro_batch=message.micro_batch, hidden=frame, loss_sum=loss)
        )

    def _take_input_gradient(self, message: pb.InputGradient) -> Iterator[pb.ClientMessage]:
        answers = self._answered.pop(message.micro_batch)
        del self._sent[message.micro_batch]
        returned = arithmetic.unpacked(message.values.payload)
        share = sum(arithmetic.of_half(*both) for both in zip(answers, returned, strict=True))
        self._gradients[message.window] = self._gradients.get(message.window, 0) + share
        if self._windows.finish(message.window, message.micro_batch):
            yield from self._finish_window(message.window)

    def _train_alone(self, window: int, micro_batch: int) -> Iterator[pb.ClientMessage]:
        texts = [arithmetic.text(self.name, place) for place in self._windows.content(window)]
        for number, text in enumerate(texts):
            value = arithmetic.alone(text.number, self.half)
            self._gradients[window] = self._gradients.get(window, 0) + value
            is_last = number == len(texts) - 1
            loss = arithmetic.loss(value, text.masked)
            yield pb.ClientMessage(
                trained=pb.Trained(window=window, loss_sum=loss, masked_tokens=text.masked, last=is_last)
            )
        self._windows.finish(window, micro_batch)
        yield from self._finish_window(window)

    def _finish_window(self, window: int) -> Iterator[pb.ClientMessage]:
        total = self._gradients.pop(window, 0)
        masked = sum(arithmetic.text(self.name, place).masked for place in self._windows.content(window))
        match self._strategy.exchange_after(window):
            case "gradients":
                yield from self._chunks(window, total, float(masked))
            case "weights":
                self.half = arithmetic.stepped_half(self.half, total)
                value = arithmetic.fp32(self.half - self.common) if self._strategy.sends_changes else self.half
                yield from self._chunks(window, value, float(masked))
            case "nothing":
                self.half = arithmetic.stepped_half(self.half, total)
                self._windows.apply(window)
                yield from self._due()

    def _update(self, chunk: pb.UpdateChunk) -> Iterator[pb.ClientMessage]:
        if not chunk.last:
            self._arrived = float(np.frombuffer(chunk.payload, np.float32)[0])
            return
        if self._strategy.exchange_after(chunk.window) == "gradients":
            self.half = arithmetic.stepped_half(self.half, int(self._arrived))
        elif self._strategy.sends_changes:
            self.half = arithmetic.fp32(self.common + self._arrived)
        else:
            self.half = self._arrived
        self.common = self.half
        self._windows.apply(chunk.window)
        yield from self._due()

    def _chunks(self, window: int, value: float, weight: float) -> Iterator[pb.ClientMessage]:
        for chunk in update_chunks(window, [(HALF, torch.tensor([value], dtype=torch.float32))]):
            yield pb.ClientMessage(update=chunk)


class Machine:
    """Where a client's processes run, one after another; its states outlive them."""

    def __init__(self, play: Play, name: str, seed: int) -> None:
        self.play, self.name = play, name
        self.states: dict[int, tuple[float, float]] = {}
        """The client model of each saved window, and what it was after the last exchange."""
        self.is_complete = False
        """It has heard that the run is complete."""
        self.is_away = False
        """It does not come back."""
        self.process: Process | None = None
        self.lives = 0
        """How many processes there were."""
        self.num_hangs = 0
        self._seed = seed
        self._join: JoinAsked | None = None
        self._paused_until = 0.0
        self._waiting: list[pb.ServerMessage] = []

    # -- joining -----------------------------------------------------------------------------------

    def start(self) -> None:
        """A new process joins."""
        self.lives += 1
        life = self.lives
        states = sorted(self.states)[-2:]
        hello = pb.Hello(
            protocol=PROTOCOL, client=self.name, shard_characters=self.play.characters(self.name), task="masked_lm",
            saved_windows=states, run="run" if states else "",
        )  # fmt: skip
        coordinator = self.play.coordinator
        if coordinator is None:
            self._again(life)
            return
        answer: Future[pb.Welcome] = Future()
        self._join = JoinAsked(hello, answer)
        answer.add_done_callback(lambda done: self.play.soon(lambda: self._answered(life, done)))
        coordinator.join(self._join)

    def _again(self, life: int) -> None:
        """Try once more in a while, unless another process has been started since."""
        if not self.is_away and not self.is_complete:
            self.play.later(lambda: self.start() if life == self.lives else None)

    def _answered(self, life: int, done: Future[pb.Welcome]) -> None:
        if life != self.lives:
            return
        self._join = None
        if done.exception() is not None:
            self._again(life)
            return
        welcome = done.result()
        process = Process(self, int(welcome.settings))
        coordinator = self.play.coordinator
        stream = None
        if coordinator is not None:
            stream = coordinator.open(
                self.name, int(welcome.endpoint), welcome.session, 1000 * self._seed + life,
                lambda message: self._hear(life, message), lambda: self.lost(life),
            )  # fmt: skip
        if stream is None:
            self._again(life)
            return
        process.stream, self.process = stream, process
        self._waiting.clear()

    # -- running -----------------------------------------------------------------------------------

    def _hear(self, life: int, message: pb.ServerMessage) -> None:
        if life != self.lives or self.process is None:
            return
        if self.play.world.now < self._paused_until:
            self._waiting.append(message)
            return
        self.process.handle(message)

    def pause(self, seconds: float) -> None:
        """The process stands still, as by SIGSTOP; messages wait for it."""
        self.num_hangs += 1
        self._paused_until = self.play.world.now + seconds
        self.play.world.after(seconds, self._wake)

    def _wake(self) -> None:
        if self.play.world.now < self._paused_until:
            return
        waiting, self._waiting = self._waiting, []
        life = self.lives
        for message in waiting:
            self._hear(life, message)

    def kill(self, notice: float, keeps_state: bool) -> None:
        """Its process ends at once; the server notices it after so many seconds."""
        self.lives += 1
        self._paused_until = 0.0
        self._waiting.clear()
        if self._join is not None and self.play.coordinator is not None:
            self.play.coordinator.join(JoinAbandoned(self._join.hello))
        self._join = None
        if self.process is not None and self.process.stream is not None:
            self.process.stream.leave(notice)
        self.process = None
        if not keeps_state:
            self.states.clear()

    def lost(self, life: int) -> None:
        """The stream is over for this process: it joins again."""
        if life == self.lives and not self.is_complete:
            self.kill(0.0, keeps_state=True)
            self._again(self.lives)

    def refused(self, reason: str, may_return: bool) -> None:
        """The server went on without it."""
        assert may_return, f"refused: {reason}"
        self.lost(self.lives)

    def finished(self, is_complete: bool) -> None:
        """The run has ended, or was stopped and will be resumed."""
        self.is_complete = is_complete
        if not is_complete:
            self.lost(self.lives)
