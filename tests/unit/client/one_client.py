"""One client trainer and the other side of its conversation, for tests of the client."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedbert_ds.client.trainer import ClientTrainer
from fedbert_ds.config import (
    FederationSection,
    ModelSection,
    OptimizerSection,
    SequenceSection,
    WireSection,
)
from fedbert_ds.data.masking import Batch
from fedbert_ds.federation.client_update import UpdateAssembler, update_chunks
from fedbert_ds.federation.reference import Reference, reference_chunks, to_bytes
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.model.cut import split
from fedbert_ds.tasks.registry import TASKS
from fedbert_ds.tasks.task import Task
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import decode, decode_positions, decode_row_index, encode
from fedbert_ds.wire.messages import ClientSettings

VOCABULARY, WIDTH = 23, 8
LENGTHS = [4, 6, 3, 5]


WORDS = TASKS["token_classification"](("O", *["I-X"] * (VOCABULARY - 1)))
"""A task whose labels are as many as the vocabulary's words: `Text` serves it, too. All but one go
on with the entity before.
"""


def half_of(cut: Any = "embeddings", dropout: float = 0.0, task: Task | None = None) -> ClientHalf:
    return copy.deepcopy(_half_of(cut, dropout, task))


@functools.cache
def _half_of(cut: Any, dropout: float, task: Task | None) -> ClientHalf:
    section = ModelSection(
        num_hidden_layers=2, hidden_size=WIDTH, num_attention_heads=2, max_position_embeddings=8, dropout=dropout
    )
    return split(build_model(section, VOCABULARY, 0, seed=5, task=task), cut)[0]


class Text:
    """Batches that follow from the window and the cursor alone."""

    def __init__(self) -> None:
        self.cursor = 0

    def next_batch(self, window: int, max_tokens: int) -> Batch:
        random = torch.Generator().manual_seed(1000 * window + self.cursor)
        self.cursor += len(LENGTHS)
        tokens = sum(LENGTHS)
        positions = (torch.rand(tokens, generator=random) < 0.4).nonzero().flatten()
        ids = torch.randint(3, 9, (tokens,), generator=random)
        return Batch(ids, list(LENGTHS), positions, torch.randint(VOCABULARY, (len(positions),), generator=random))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": 0, "position": self.cursor, "sequences": 1000}

    def load_state_dict(self, state: dict[str, int] | None) -> None:
        self.cursor = state["position"] if state else 0


def settings_of(**changes: Any) -> ClientSettings:
    fields: dict[str, Any] = {
        "seed": 1, "windows": 6, "tokens": sum(LENGTHS), "tokens_per_micro_batch": sum(LENGTHS),
        "sequences": SequenceSection(sequence_length=8, mask_probability=0.4),
        "federation": FederationSection(), "wire": WireSection(),
        "optimizer": OptimizerSection(name="sgd", lr=0.5, schedule="constant", gradient_clipping=0.0, weight_decay=0.0),
    }  # fmt: skip
    return ClientSettings(**(fields | changes))


class Server:
    """The other side for one trainer, with a body that does nothing: hidden states are the
    activations asked back.
    """

    def __init__(self, folder: Path, half: ClientHalf, text: Text | None = None, **changes: Any) -> None:
        self.sent: list[pb.ClientMessage] = []
        """All but the Begun, which are in `attempts`."""
        self.attempts: list[int] = []
        """Those that the trainer says it has begun."""
        self.settings = settings_of(**changes)
        self.text = Text() if text is None else text
        self.half = half
        self.trainer = ClientTrainer(
            half, self.text, self.settings, "ada", folder, torch.device("cpu"), self._sent,  # type: ignore[arg-type]
        )  # fmt: skip
        self.values: dict[int, pb.Activations] = {}
        self.window_of: dict[int, int] = {}
        self.masked_tokens: dict[int, int] = {}
        """M of each window."""
        self.manifests: list[pb.Manifest] = []
        self.planned: dict[int, pb.Manifest] = {}
        """The manifest of each planned window."""
        self.sizes: dict[int, tuple[int, int]] = {}
        """Tokens and masked tokens of each micro-batch."""

    def _sent(self, message: pb.ClientMessage) -> None:
        if message.HasField("begun"):
            assert not self.sent or self.attempts, "it is the first that a client says"
            self.attempts.append(message.begun.attempt)
        else:
            self.sent.append(message)

    def take(self, kind: str) -> Any:
        """The oldest message sent, which must be of this kind; manifests are put aside."""
        while self.sent and self.sent[0].WhichOneof("body") == "manifest":
            self.manifests.append(self.sent.pop(0).manifest)
        if kind == "manifest":
            return self.manifests.pop(0)
        message = self.sent.pop(0)
        assert message.WhichOneof("body") == kind
        return getattr(message, kind)

    @property
    def answers(self) -> list[pb.ClientMessage]:
        """What was sent beside manifests."""
        return [message for message in self.sent if message.WhichOneof("body") not in ("manifest", "begun")]

    def give_update(self, tensors: dict[str, Tensor], window: int = 0) -> None:
        for chunk in update_chunks(window, tensors.items()):
            self.trainer.handle(pb.ServerMessage(update=chunk))

    def give_reference(self, reference: Reference) -> None:
        for message in reference_chunks(to_bytes(reference)):
            self.trainer.handle(message)

    def begin(self, next_window: int = 0) -> None:
        """A new run, with the weights that the half has; `next_window` is its first."""
        self.give_begin(0, next_window, reference=True)
        self.give_reference(Reference(0, self.weights()))

    def give_begin(self, window: int = 0, next_window: int | None = None, **fields: Any) -> None:
        """Tell where to go on; by default with `window` itself."""
        following = window if next_window is None else next_window
        self.trainer.handle(pb.ServerMessage(begin=pb.Begin(window=window, next_window=following, **fields)))

    def weights(self) -> dict[str, Tensor]:
        """A copy of the half's weights."""
        return {name: parameter.detach().clone() for name, parameter in self.half.named_parameters()}

    def plan(self, cuts: list[int], masked_tokens: int, first: int = 10) -> pb.Manifest:
        """Plan micro-batches `first`, `first` + 1, ... whose sequences end where `cuts` say."""
        manifest = self.take("manifest")
        self.planned[manifest.window] = manifest
        bounds = [0, *cuts, len(manifest.lengths)]
        pieces = [
            pb.Piece(micro_batch=first + number, first_sequence=start, num_sequences=end - start)
            for number, (start, end) in enumerate(itertools.pairwise(bounds))
        ]
        for piece in pieces:
            ours = slice(piece.first_sequence, piece.first_sequence + piece.num_sequences)
            self.sizes[piece.micro_batch] = sum(manifest.lengths[ours]), sum(manifest.masked[ours])
            self.window_of[piece.micro_batch] = manifest.window
        self.masked_tokens[manifest.window] = masked_tokens
        plan = pb.Plan(window=manifest.window, pieces=pieces, next_window=manifest.window + 1)
        self.trainer.handle(pb.ServerMessage(plan=plan))
        return manifest

    def give_credit(self, micro_batch: int) -> None:
        credit = pb.Open(window=self.window_of[micro_batch], micro_batch=micro_batch)
        self.trainer.handle(pb.ServerMessage(open=credit))

    def open(self, micro_batch: int) -> None:
        self.give_credit(micro_batch)
        self.take_activations(micro_batch)

    def take_activations(self, micro_batch: int) -> None:
        self.values[micro_batch] = self.take("activations")
        assert self.values[micro_batch].micro_batch == micro_batch

    def hidden(self, micro_batch: int) -> pb.Gradient:
        message = self.values[micro_batch]
        window = self.window_of[micro_batch]
        values, index = self._decoded(message)
        hidden = (values if index is None else values[index])[self._positions(message)]
        frame = encode(hidden, self.settings.wire.hidden_states)
        self.trainer.handle(
            pb.ServerMessage(
                hidden=pb.Hidden(
                    window=window, micro_batch=micro_batch, values=frame, masked_tokens=self.masked_tokens[window]
                )
            )
        )
        return self.take("gradient")

    def input_gradient(self, gradient: pb.Gradient) -> None:
        message = self.values[gradient.micro_batch]
        values, index = self._decoded(message)
        rows = self._positions(message)
        back = decode(gradient.hidden, (len(rows), WIDTH), self.settings.wire.gradients, "gradient")
        result = torch.zeros_like(values).index_add_(0, rows if index is None else index[rows], back)
        frame = encode(result, self.settings.wire.gradients)
        answer = pb.InputGradient(window=gradient.window, micro_batch=gradient.micro_batch, values=frame)
        self.trainer.handle(pb.ServerMessage(input_gradient=answer))

    def window(self, cuts: tuple[int, ...] = (2,), masked_tokens: int = 40, first: int = 10) -> float:
        """A whole window up to the last input gradient; the loss it reported."""
        self.plan(list(cuts), masked_tokens, first)
        gradients = []
        for micro_batch in range(first, first + 1 + len(cuts)):
            self.open(micro_batch)
            gradients.append(self.hidden(micro_batch))
        for gradient in gradients:
            self.input_gradient(gradient)
        return sum(gradient.loss_sum for gradient in gradients)

    def skip(self, window: int, *micro_batches: int) -> None:
        self.trainer.handle(pb.ServerMessage(skipped=pb.Skipped(window=window, micro_batches=micro_batches)))

    def suspend(self, window: int, next_window: int) -> None:
        """Windows from `window` on were planned without this client."""
        plan = pb.Plan(window=window, next_window=next_window)
        self.trainer.handle(pb.ServerMessage(plan=plan))

    def take_update(self) -> dict[str, Tensor]:
        """The update the trainer has sent."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.half.named_parameters()}
        names = {message.update.name for message in self.sent if message.WhichOneof("body") == "update"}
        joined = UpdateAssembler({name: shapes[name] for name in names if name}, "it")
        while (complete := joined.add(self.take("update"))) is None:
            pass
        return dict(complete)

    def _decoded(self, message: pb.Activations) -> tuple[Tensor, Tensor | None]:
        values = decode(message.values, message.values.shape, self.settings.wire.activations, "activations")
        if not message.row_index:
            return values, None
        return values, decode_row_index(message.row_index, self.sizes[message.micro_batch][0], len(values), "rows")

    def _positions(self, message: pb.Activations) -> Tensor:
        return decode_positions(message.masked_positions, *self.sizes[message.micro_batch], "positions")


def unsplit(half: ClientHalf, batch: Batch, masked_tokens: int) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of the same computation in one piece."""
    half = copy.deepcopy(half)
    half.zero_grad()
    activations = half.embed(batch.input_ids, batch.lengths)
    index = activations.row_index
    per_token = activations.values if index is None else activations.values[index.long()]
    loss = functional.cross_entropy(half.logits(per_token[batch.masked_positions]), batch.labels, reduction="sum")
    (loss / masked_tokens).backward()
    return loss.item(), {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in half.named_parameters()
    }


def batch_of(window: int) -> Batch:
    """The batch of a window when every window before took one."""
    text = Text()
    text.cursor = len(LENGTHS) * window
    return text.next_batch(window, 0)
