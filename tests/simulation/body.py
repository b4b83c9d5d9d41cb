"""A toy body: sums of whole numbers in place of tensors, with the collectives of real ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulation import arithmetic
from simulation.ranks import Group

from fedbert_ds.server.contract import Tally
from fedbert_ds.server.network.outbox import Outbox
from fedbert_ds.server.queue.decisions import Backward, Forward
from fedbert_ds.server.queue.packing import Piece
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.messages import Manifest

Batches = Mapping[tuple[str, int], range]
"""The places of a client's sequences in a window, as it last announced them."""


@dataclass(frozen=True)
class Step:
    """What one step of the body was made of, on all ranks."""

    window: int
    total: int
    """The sum of all gradients."""
    trained: tuple[tuple[str, int], ...]
    """Clients and places of the sequences with a gradient, sorted."""
    all_masked: int
    """Masked tokens that the loss is a mean over."""
    planned: int
    """Masked tokens of the manifests that the window was planned with."""


@dataclass
class BodyState:
    """The weights, and the steps behind them."""

    weights: int = 0
    steps: list[Step] = field(default_factory=list)


class Body:
    """One rank's engine and its micro-batches.

    Every step is a collective; so are forwards and backwards with `lockstep_forwards`. Each piece
    is held against the text that its client announced in `batches`, and with `half`, which says
    what the client model is just now, against that.
    """

    zero_stage = 2
    lost_gradient = False
    num_parameters = 1

    def __init__(
        self,
        group: Group,
        lockstep_forwards: bool,
        disk: dict[tuple[int, int], BodyState],
        batches: Batches,
        half: Callable[[], float] | None,
    ) -> None:
        self.rank = group.rank
        self.lockstep_forwards = lockstep_forwards
        self.state = BodyState()
        self.outbox: Outbox | None = None
        self.tally = Tally()
        self.service_seconds = 0.0
        self._group, self._disk, self._batches, self._half_now = group, disk, batches, half
        self._half: float | None = None
        self._window = self._all_masked = self._planned = 0
        self._total = 0
        self._trained: list[tuple[str, int]] = []
        self._graphs: dict[int, tuple[tuple[Piece, ...], list[list[int]]]] = {}
        self._sends: list[tuple[float, Callable[[], None]]] = []

    # -- an engine ---------------------------------------------------------------------------------

    def step(self, learning_rate: float, client_norm: float = 0.0) -> float:
        assert not self._graphs, "a step inside a window"
        parts = self._group.meet(("step", self._window), (self._total, self._trained, client_norm, self._planned))
        total = sum(part[0] for part in parts)
        assert len({part[2] for part in parts}) == 1, "ranks clip by different norms"
        trained = tuple(sorted(sequence for part in parts for sequence in part[1]))
        self.state.weights = arithmetic.stepped_body(self.state.weights, total)
        self.state.steps.append(Step(self._window, total, trained, self._all_masked, sum(part[3] for part in parts)))
        self._drop()
        return 1.0

    def drop_gradients(self) -> None:
        assert not self._graphs, "inside a window"
        self._group.meet("drop", None)
        self._drop()

    def save(self, folder: Path, window: int) -> None:
        self._group.work()
        self._disk[window, self._group.rank] = BodyState(self.state.weights, list(self.state.steps))

    def load(self, folder: Path, window: int, ranks: int, stage: int) -> None:
        saved = [self._disk[window, rank] for rank in range(ranks)]
        assert all(part == saved[0] for part in saved), "ranks saved different bodies"
        self.state = BodyState(saved[0].weights, list(saved[0].steps))
        self._drop()

    def affordable_in_flight(self) -> int:
        return 8

    def take_recompiles(self) -> int:
        return 0

    # -- micro-batches -----------------------------------------------------------------------------

    def begin(
        self, window: int, micro_batches: Sequence[int], manifests: Sequence[Manifest], masked_tokens: int
    ) -> None:
        assert not self._graphs and not self._total and not self._trained, "of an earlier window"
        self._window, self._all_masked = window, masked_tokens
        self._half = None if self._half_now is None else self._half_now()
        self._planned = sum(sum(manifest.masked) for manifest in manifests)

    def forward(self, decision: Forward, arrived: Sequence[Any]) -> None:
        if self.lockstep_forwards:
            self._group.meet("forward", None)
        values = [list(arithmetic.unpacked(item.values)) for item in arrived]
        assert [len(each) for each in values] == [piece.num_sequences for piece in decision.pieces]
        assert decision.micro_batch not in self._graphs
        if self._half is not None:
            for piece, numbers in zip(decision.pieces, values, strict=True):
                expected = [arithmetic.activation(one.number, self._half) for one in self._texts(piece)]
                assert numbers == expected, f"{piece.client} sent activations of another text or model"
        self._graphs[decision.micro_batch] = decision.pieces, values
        self.tally.forwards += 1
        self.tally.tokens += sum(piece.tokens for piece in decision.pieces)
        window, all_masked, weights = self._window, self._all_masked, self.state.weights

        def send() -> None:
            for piece, numbers in zip(decision.pieces, values, strict=True):
                frame = pb.TensorFrame(payload=arithmetic.packed(arithmetic.hidden(n, weights) for n in numbers))
                place = {"window": window, "micro_batch": decision.micro_batch}
                hidden = pb.Hidden(**place, values=frame, masked_tokens=all_masked)
                self._send(piece.client, pb.ServerMessage(hidden=hidden))

        self._sends.append((self._group.work_seconds(), send))

    def backward(self, decision: Backward, gradients: Mapping[str, Any]) -> None:
        if self.lockstep_forwards:
            self._group.meet("backward", None)
        pieces, values = self._graphs.pop(decision.micro_batch)
        assert {piece.client for piece in decision.pieces} == gradients.keys()
        window, weights = self._window, self.state.weights
        returned: list[tuple[str, bytes]] = []
        for piece, numbers in zip(pieces, values, strict=True):
            if piece.client not in gradients:
                continue
            answers = arithmetic.unpacked(gradients[piece.client])
            if self._half is not None:
                expected = [
                    arithmetic.gradient(one.number, self._half, arithmetic.hidden(n, weights), self._all_masked)
                    for one, n in zip(self._texts(piece), numbers, strict=True)
                ]
                assert answers == expected, f"{piece.client} sent a gradient of another piece"
            both = list(zip(answers, numbers, strict=True))
            self._total += sum(arithmetic.of_body(answer, number) for answer, number in both)
            self._trained += [(piece.client, place) for place in self._places(piece)]
            back = arithmetic.packed(arithmetic.input_gradient(answer, number, weights) for answer, number in both)
            returned.append((piece.client, back))
        self.tally.backwards += 1

        def send() -> None:
            for client, back in returned:
                place = {"window": window, "micro_batch": decision.micro_batch}
                message = pb.InputGradient(**place, values=pb.TensorFrame(payload=back))
                self._send(client, pb.ServerMessage(input_gradient=message))

        self._sends.append((self._group.work_seconds(), send))

    @property
    def has_pending_sends(self) -> bool:
        return bool(self._sends)

    def send_finished(self, wait: bool = False) -> None:
        while self._sends and (wait or self._sends[0][0] <= self._group.now):
            if (seconds := self._sends[0][0] - self._group.now) > 0:
                self._group.sleep(seconds)
            self._sends.pop(0)[1]()
            wait = False

    def end(self) -> None:
        while self._sends:
            self.send_finished(wait=True)

    def take_tally(self) -> Tally:
        tally, self.tally = self.tally, Tally()
        return tally

    def _places(self, piece: Piece) -> range:
        return self._batches[piece.client, self._window][piece.first_sequence :][: piece.num_sequences]

    def _texts(self, piece: Piece) -> list[arithmetic.Text]:
        return [arithmetic.text(piece.client, place) for place in self._places(piece)]

    def _drop(self) -> None:
        self._total = 0
        self._trained = []

    def _send(self, client: str, message: pb.ServerMessage) -> None:
        assert self.outbox is not None
        self.outbox.send(client, message)
