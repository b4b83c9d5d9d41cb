"""A client's side of a window: gradients are those of the unsplit computation in any order; it resumes exactly."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fedbert_ds.client.trainer import ClientTrainer
from fedbert_ds.config import (
    FederationSection,
    LayersCut,
    ModelSection,
    OptimizerSection,
    SequenceSection,
    WireSection,
)
from fedbert_ds.data.masking import Batch
from fedbert_ds.errors import RunError, WireError
from fedbert_ds.federation.client_update import UpdateAssembler, update_chunks
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.model.cut import split
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import decode, decode_positions, decode_row_index, encode
from fedbert_ds.wire.messages import ClientSettings

VOCABULARY, WIDTH = 23, 8
LENGTHS = [4, 6, 3, 5]
CUTS: list[Any] = ["embeddings", "rows", LayersCut(layers=1)]


def half_of(cut: Any = "embeddings", dropout: float = 0.0) -> ClientHalf:
    return copy.deepcopy(_half_of(cut, dropout))


@functools.cache
def _half_of(cut: Any, dropout: float) -> ClientHalf:
    section = ModelSection(
        num_hidden_layers=2, hidden_size=WIDTH, num_attention_heads=2, max_position_embeddings=8, dropout=dropout
    )
    return split(build_model(section, VOCABULARY, 0, seed=5), cut)[0]


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
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.cursor = state["cursor"]


def settings_of(**changes: Any) -> ClientSettings:
    fields: dict[str, Any] = {
        "seed": 1, "windows": 6, "tokens": sum(LENGTHS),
        "sequences": SequenceSection(sequence_length=8, mask_probability=0.4),
        "federation": FederationSection(), "wire": WireSection(),
        "optimizer": OptimizerSection(name="sgd", lr=0.5, schedule="constant", gradient_clipping=0.0, weight_decay=0.0),
    }  # fmt: skip
    return ClientSettings(**(fields | changes))


class Server:
    """The other side for one trainer, with a body that does nothing: hidden states are the activations asked back."""

    def __init__(self, folder: Path, half: ClientHalf, first_window: int = 0, **changes: Any) -> None:
        self.sent: list[pb.ClientMessage] = []
        self.settings = settings_of(**changes)
        self.text = Text()
        self.half = half
        self.trainer = ClientTrainer(
            half, self.text, self.settings, "ada", folder, first_window, torch.device("cpu"), self.sent.append  # type: ignore[arg-type]
        )  # fmt: skip
        self.values: dict[int, pb.Activations] = {}
        self.window_of: dict[int, int] = {}
        self.masked_tokens: dict[int, int] = {}
        """M of each window."""
        self.manifests: list[pb.Manifest] = []
        self.sizes: dict[int, tuple[int, int]] = {}
        """Tokens and masked tokens of each micro-batch."""

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
        return [message for message in self.sent if message.WhichOneof("body") != "manifest"]

    def give_half(self, tensors: dict[str, Tensor], window: int = 0) -> None:
        for chunk in update_chunks(window, tensors.items(), weight=0.0):
            self.trainer.handle(pb.ServerMessage(update=chunk))

    def begin(self) -> None:
        self.give_half({name: parameter.detach() for name, parameter in self.half.named_parameters()})

    def plan(self, cuts: list[int], masked_tokens: int, first: int = 10) -> pb.Manifest:
        """Plan micro-batches `first`, `first` + 1, ... whose sequences end where `cuts` say."""
        manifest = self.take("manifest")
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

    def pass_over(self, window: int, next_window: int) -> None:
        """Windows from `window` on were planned without this client."""
        plan = pb.Plan(window=window, next_window=next_window)
        self.trainer.handle(pb.ServerMessage(plan=plan))

    def take_half(self) -> tuple[dict[str, Tensor], float]:
        """The half (or its gradients) the trainer has sent."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.half.named_parameters()}
        names = {message.update.name for message in self.sent if message.WhichOneof("body") == "update"}
        joined = UpdateAssembler({name: shapes[name] for name in names if name}, "it")
        while (complete := joined.add(self.take("update"))) is None:
            pass
        return complete

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


# -- one window -----------------------------------------------------------------------------------------------------


def test_the_manifest_counts_what_comes(tmp_path: Path) -> None:
    server = Server(tmp_path, half_of())
    server.trainer.begin()
    assert server.sent == [], "a new run begins with the server's weights"
    server.begin()
    batch = Text().next_batch(0, 0)
    manifest = server.plan([1], 40)
    assert manifest.window == 0 and list(manifest.lengths) == LENGTHS
    first = 0
    for length, count in zip(LENGTHS, manifest.masked, strict=True):
        assert count == sum(first <= position < first + length for position in batch.masked_positions.tolist())
        first += length


@pytest.mark.parametrize("cut", CUTS, ids=str)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_gradients_are_those_of_the_unsplit_computation(tmp_path: Path, cut: Any, data: st.DataObject) -> None:
    """Whatever the micro-batches, and in whatever order their messages come."""
    server = Server(tmp_path, half_of(cut))
    server.begin()
    loss, expected = unsplit(server.half, Text().next_batch(0, 0), masked_tokens=40)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(LENGTHS) - 1))))
    server.plan(cuts, 40)
    waiting = {10 + number: "open" for number in range(len(cuts) + 1)}
    gradients: dict[int, pb.Gradient] = {}
    while waiting:
        micro_batch = data.draw(st.sampled_from(sorted(waiting)))
        match waiting[micro_batch]:
            case "open":
                server.open(micro_batch)
                waiting[micro_batch] = "hidden"
            case "hidden":
                gradients[micro_batch] = server.hidden(micro_batch)
                waiting[micro_batch] = "input gradient"
            case _:
                server.input_gradient(gradients[micro_batch])
                del waiting[micro_batch]
        assert bool(server.answers) == (not waiting), "the sum of gradients leaves once, with the last input gradient"
    got, weight = server.take_half()
    assert weight == 1.0 and not server.answers
    assert sum(gradient.loss_sum for gradient in gradients.values()) == pytest.approx(loss, rel=1e-5)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


def test_dropout_follows_from_the_place_not_from_the_order(tmp_path: Path) -> None:
    values = []
    for order in ([10, 11], [11, 10]):
        server = Server(tmp_path, half_of(dropout=0.5))
        server.begin()
        server.plan([2], 40)
        for micro_batch in order:
            torch.rand(17)  # somebody else draws in between
            server.open(micro_batch)
        values.append({number: message.values.payload for number, message in server.values.items()})
    assert values[0] == values[1]


# -- steps ----------------------------------------------------------------------------------------------------------


def test_a_synchronous_half_steps_with_everybodys_gradients(tmp_path: Path) -> None:
    server = Server(tmp_path, half_of())
    server.begin()
    server.window()
    server.take_half()
    before = {name: parameter.detach().clone() for name, parameter in server.half.named_parameters()}
    assert all(torch.equal(parameter, before[name]) for name, parameter in server.half.named_parameters())
    everybody = {name: torch.full_like(tensor, 0.25) for name, tensor in before.items()}
    server.give_half(everybody)
    for name, parameter in server.half.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.5 * 0.25)
    assert server.take("manifest").window == 1, "drawn when window 0 was planned"


def test_a_parallel_half_steps_by_its_own_mean_loss(tmp_path: Path) -> None:
    """M is everybody's; in FedAvg a client follows the mean over its own masked tokens."""
    server = Server(tmp_path, half_of(), federation=FederationSection(mode="parallel", average_every=2))
    server.begin()
    before = {name: parameter.detach().clone() for name, parameter in server.half.named_parameters()}
    batch = Text().next_batch(0, 0)
    _, expected = unsplit(server.half, batch, masked_tokens=len(batch.labels))
    server.window(masked_tokens=1000)
    assert not server.answers
    for name, parameter in server.half.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.5 * expected[name], atol=1e-5, rtol=1e-4)
    second = server.window()
    assert second > 0
    weights, weight = server.take_half()
    assert weight == len(batch.labels) + len(batch_of(1).labels), "masked tokens since the last average"
    assert all(torch.equal(weights[name], parameter) for name, parameter in server.half.named_parameters())
    server.give_half({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, window=1)
    assert not any(parameter.any() for parameter in server.half.parameters())
    for _ in range(2):
        server.window()
    assert server.take_half()[1] == len(batch_of(2).labels) + len(batch_of(3).labels), "counted anew"


def batch_of(window: int) -> Batch:
    """The batch of a window when every window before took one."""
    text = Text()
    text.cursor = len(LENGTHS) * window
    return text.next_batch(window, 0)


@pytest.mark.parametrize("scope", ["embeddings", "head"])
def test_what_is_not_averaged_never_leaves(tmp_path: Path, scope: Any) -> None:
    federation = FederationSection(mode="parallel", average_scope=scope)
    server = Server(tmp_path, half_of(), federation=federation)
    server.begin()
    server.window()
    weights, _ = server.take_half()
    assert weights and {server.half.parameter_scope(name) for name in weights} == {scope}
    personal = {n: p.detach().clone() for n, p in server.half.named_parameters() if n not in weights}
    assert personal
    server.give_half({name: torch.zeros_like(tensor) for name, tensor in weights.items()})
    for name, parameter in server.half.named_parameters():
        assert torch.equal(parameter, personal[name]) if name in personal else not parameter.any()


def test_the_learning_rate_follows_the_schedule_and_gradients_are_clipped(tmp_path: Path) -> None:
    optimizer = OptimizerSection(name="sgd", lr=1.0, warmup_windows=4, gradient_clipping=0.1, weight_decay=0.0)
    server = Server(tmp_path, half_of(), optimizer=optimizer)
    server.begin()
    server.window()
    server.take_half()
    before = torch.cat([parameter.detach().flatten() for parameter in server.half.parameters()])
    server.give_half({name: torch.full_like(p, 3.0) for name, p in server.half.named_parameters()})
    after = torch.cat([parameter.detach().flatten() for parameter in server.half.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.25 * 0.1, rel=1e-3)


def test_the_last_window_is_followed_by_none(tmp_path: Path) -> None:
    server = Server(tmp_path, half_of(), windows=1)
    server.begin()
    server.window()
    server.take_half()
    server.give_half({name: torch.zeros_like(p) for name, p in server.half.named_parameters()})
    assert not server.sent and not server.manifests
    server.trainer.handle(pb.ServerMessage(update_request=pb.UpdateRequest(window=1)))
    weights, weight = server.take_half()
    assert weight == len(batch_of(0).labels) and len(weights) == len(list(server.half.parameters()))
    server.trainer.handle(pb.ServerMessage(finish=pb.Finish(reason="done", complete=True)))
    assert server.trainer.finish == pb.Finish(reason="done", complete=True)


# -- windows one after another --------------------------------------------------------------------------------------


def test_nothing_of_the_next_window_is_sent_before_the_half_has_stepped(tmp_path: Path) -> None:
    server = Server(tmp_path, half_of())
    server.begin()
    server.window()
    server.plan([], 40, first=20)
    server.give_credit(20)
    gradients, _ = server.take_half()
    assert not server.answers
    server.give_half(gradients, window=0)
    server.take_activations(20)
    expected = server.half.embed(batch_of(1).input_ids, batch_of(1).lengths).values
    values = decode(server.values[20].values, tuple(expected.shape), "fp32", "it")
    assert torch.equal(values, expected.detach()), "with the weights after the step"


@pytest.mark.parametrize("mode", ["synchronous", "parallel"])
def test_with_staleness_the_next_window_goes_on_before_the_exchange(tmp_path: Path, mode: Any) -> None:
    """Steps equal a plain reference in which each window's gradients are of the weights that were there then."""
    federation = FederationSection(mode=mode, staleness=1)
    server = Server(tmp_path, half_of(), federation=federation)
    reference = half_of()
    server.begin()
    masked = [len(batch_of(window).labels) for window in range(2)]
    server.window(masked_tokens=masked[0])
    sent = [server.take_half()[0]]
    # Window 1, though what window 0 combines is not back.
    server.window(masked_tokens=masked[1], first=20)
    sent.append(server.take_half()[0])
    server.plan([], masked_tokens=40, first=30)
    server.give_credit(30)
    assert not server.answers, "two windows ahead is too far"

    def step(gradients: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                parameter -= 0.5 * gradients[name]

    _, first = unsplit(reference, batch_of(0), masked[0])
    if mode == "synchronous":
        _, second = unsplit(reference, batch_of(1), masked[1])
        for name in first:
            torch.testing.assert_close(sent[0][name], first[name], atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(sent[1][name], second[name], atol=1e-6, rtol=1e-4)
        server.give_half(sent[0], window=0)
        server.give_half(sent[1], window=1)
        step(first)
        step(second)
    else:
        step(first)
        after_first = copy.deepcopy(reference.state_dict())
        step(unsplit(reference, batch_of(1), masked[1])[1])
        # The average is elsewhere; the step that was made since is kept.
        server.give_half({name: tensor + 1.0 for name, tensor in sent[0].items()}, window=0)
        for name, parameter in reference.named_parameters():
            torch.testing.assert_close(sent[0][name], after_first[name], atol=1e-6, rtol=1e-4)
            parameter.data += 1.0
    for (name, got), (_, wanted) in zip(server.half.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4, msg=name)
    server.take_activations(30)


@pytest.mark.parametrize("mode", ["synchronous", "parallel"])
def test_the_window_goes_on_without_skipped_pieces(tmp_path: Path, mode: Any) -> None:
    server = Server(tmp_path, half_of(), federation=FederationSection(mode=mode, average_every=10))
    server.begin()
    before = {name: parameter.detach().clone() for name, parameter in server.half.named_parameters()}
    server.plan([2], 40)
    server.open(10)
    server.input_gradient(server.hidden(10))
    server.skip(0, 11)
    if mode == "synchronous":
        server.give_half(server.take_half()[0], window=0)
    else:
        batch = batch_of(0)
        tokens = sum(LENGTHS[:2])
        kept = batch.masked_positions < tokens
        first = Batch(batch.input_ids[:tokens], LENGTHS[:2], batch.masked_positions[kept], batch.labels[kept])
        again = half_of()
        _, expected = unsplit(again, first, masked_tokens=len(first.labels))
        for name, parameter in server.half.named_parameters():
            torch.testing.assert_close(parameter.detach(), before[name] - 0.5 * expected[name], atol=1e-5, rtol=1e-4)
    server.skip(0, 11)  # once more does nothing
    server.plan([], 40, first=20)
    server.open(20)
    assert server.values[20].window == 1


def test_a_half_that_gave_a_gradient_for_nothing_steps_by_its_mean(tmp_path: Path) -> None:
    """The head has gradients of pieces that were skipped then; they must not count as if M were its own."""
    server = Server(tmp_path, half_of(), federation=FederationSection(mode="parallel", average_every=10))
    server.begin()
    head = {n: p.detach().clone() for n, p in server.half.named_parameters()}
    _, expected = unsplit(server.half, batch_of(0), masked_tokens=len(batch_of(0).labels))
    server.plan([], 1000)
    server.open(10)
    server.hidden(10)
    server.skip(0, 10)
    for name, parameter in server.half.named_parameters():
        if server.half.parameter_scope(name) == "head" and "bias" in name:
            torch.testing.assert_close(parameter.detach(), head[name] - 0.5 * expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("federation", [{"mode": "synchronous"}, {"mode": "parallel"},
                                        {"mode": "parallel", "average_every": 10}], ids=str)  # fmt: skip
@pytest.mark.parametrize("halves_first", [False, True])
def test_a_client_that_was_passed_over_goes_on_where_the_others_are(
    tmp_path: Path, federation: dict[str, Any], halves_first: bool
) -> None:
    """Windows 1 and 2 were planned without it; what halves exchanged in them may come before or after it is told."""
    server = Server(tmp_path, half_of(), federation=FederationSection(**federation))
    server.begin()
    server.window()
    if exchanges := federation.get("average_every") is None:
        server.give_half(server.take_half()[0], window=0)
    assert server.take("manifest").window == 1

    def give_halves() -> None:
        for window in (1, 2) if exchanges else ():
            server.give_half({name: torch.zeros_like(p) for name, p in server.half.named_parameters()}, window)

    if halves_first:
        give_halves()
    server.pass_over(1, next_window=3)
    server.plan([], 40, first=30)
    server.give_credit(30)
    if exchanges and not halves_first:
        assert not server.answers, "it would be with weights that are about to change"
        give_halves()
    server.take_activations(30)
    assert server.values[30].window == 3
    server.trainer.handle(pb.ServerMessage(save=pb.Save(window=3)))
    assert server.take("saved").window == 3


def test_a_late_parallel_client_saves_though_it_was_not_told_of_every_window(tmp_path: Path) -> None:
    server = Server(tmp_path, half_of(), federation=FederationSection(mode="parallel", average_every=10))
    server.begin()
    server.window()
    server.trainer.handle(pb.ServerMessage(save=pb.Save(window=4)))
    assert server.take("saved").window == 4


# -- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["synchronous", "parallel"])
def test_a_resumed_client_goes_on_bit_for_bit(tmp_path: Path, mode: Any) -> None:
    changes = {
        "federation": FederationSection(mode=mode, average_every=3),
        "optimizer": OptimizerSection(lr=0.05, schedule="linear"),
    }

    def train(server: Server, windows: range) -> None:
        for window in windows:
            server.window()
            if mode == "synchronous" or (window + 1) % 3 == 0:
                server.give_half(server.take_half()[0], window)

    whole = Server(tmp_path / "whole", half_of(dropout=0.2), **changes)
    whole.begin()
    train(whole, range(2))
    # The batch of window 2 is drawn already, and window 2 may be planned and have credit.
    whole.trainer.handle(pb.ServerMessage(save=pb.Save(window=2)))
    saved = whole.take("saved")
    assert saved.window == 2 and saved.peak_memory_bytes > 1 << 20 and saved.flops_per_token > 0
    (manifest,) = whole.manifests
    train(whole, range(2, 5))

    again = Server(tmp_path / "whole", half_of(dropout=0.2), first_window=2, **changes)
    again.trainer.begin()
    assert [message.manifest for message in again.sent] == [manifest]
    train(again, range(2, 5))
    for (name, one), (_, other) in zip(whole.half.named_parameters(), again.half.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_client_without_the_state_of_that_window_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"state-3\.pt: cannot be read"):
        Server(tmp_path, half_of(), first_window=3)


# -- a server that is out of step -----------------------------------------------------------------------------------

PLAN_OF = {"micro_batch": 10, "first_sequence": 0, "num_sequences": 2}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (pb.ServerMessage(), "of kind None, which this version does not know"),
        (pb.ServerMessage(refused=pb.Refused(reason="so")), "the server refused this client: so"),
        (pb.ServerMessage(open=pb.Open(micro_batch=77)), "asks for micro-batch 77, in which this client has no piece"),
        (pb.ServerMessage(hidden=pb.Hidden(micro_batch=77)), "asks for micro-batch 77"),
        (pb.ServerMessage(hidden=pb.Hidden(micro_batch=10)), "hidden states: shape"),
        (pb.ServerMessage(input_gradient=pb.InputGradient(micro_batch=77)), "asks for micro-batch 77"),
        (pb.ServerMessage(save=pb.Save(window=5)), "the server saves window 5, this client is at 0"),
        (pb.ServerMessage(update=pb.UpdateChunk(name="x")), "tensor 'x' of shape"),
        (
            pb.ServerMessage(plan=pb.Plan(next_window=1, pieces=[pb.Piece(first_sequence=3, num_sequences=2)])),
            "sequences 3 to 5 of 4",
        ),
        (pb.ServerMessage(plan=pb.Plan(next_window=1, pieces=[pb.Piece(first_sequence=9)])), "sequences 9 to 9 of 4"),
    ],
)
def test_a_message_that_does_not_fit_is_one_line(tmp_path: Path, message: pb.ServerMessage, reason: str) -> None:
    server = Server(tmp_path, half_of())
    server.begin()
    server.plan([2], 40)
    with pytest.raises(WireError) as caught:
        server.trainer.handle(message)
    assert reason in str(caught.value)


def test_messages_out_of_turn_are_one_line(tmp_path: Path) -> None:
    server = Server(tmp_path, half_of())
    for early in (
        pb.ServerMessage(open=pb.Open()),
        pb.ServerMessage(hidden=pb.Hidden()),
        pb.ServerMessage(plan=pb.Plan(pieces=[pb.Piece()], next_window=1)),
    ):
        with pytest.raises(WireError, match="window 0, which this client has not under way"):
            server.trainer.handle(early)
    with pytest.raises(WireError, match="plans window 0 after window 0"):
        server.trainer.handle(pb.ServerMessage(plan=pb.Plan()))
    server.begin()
    server.plan([2], 40)
    server.open(10)
    gradient = server.hidden(10)
    server.input_gradient(gradient)
    with pytest.raises(WireError, match="asks for micro-batch 10, in which this client has no piece"):
        server.input_gradient(gradient)
    early = pb.InputGradient(micro_batch=11)
    with pytest.raises(WireError, match="input gradient of micro-batch 11 too many"):
        server.trainer.handle(pb.ServerMessage(input_gradient=early))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_message_is_handled_or_one_line(tmp_path: Path, data: st.DataObject) -> None:
    """Messages of the right kind with numbers drawn at random, and their bytes changed."""
    server = Server(tmp_path, half_of())
    server.begin()
    server.plan([2], 40)
    server.open(10)
    small, any_number = st.integers(0, 12), st.integers(0, 2**32 - 1)
    number = small | any_number
    frame = encode(torch.zeros(data.draw(st.integers(0, 6)), WIDTH), "fp32")
    message = data.draw(
        st.one_of(
            st.builds(
                lambda p, f, n: pb.ServerMessage(
                    plan=pb.Plan(pieces=[pb.Piece(micro_batch=p, first_sequence=f, num_sequences=n)])
                ),
                number, number, number,
            ),
            st.builds(lambda n: pb.ServerMessage(open=pb.Open(micro_batch=n)), number),
            st.builds(lambda n: pb.ServerMessage(hidden=pb.Hidden(micro_batch=n, values=frame)), number),
            st.builds(lambda n: pb.ServerMessage(input_gradient=pb.InputGradient(micro_batch=n, values=frame)), number),
            st.builds(lambda n: pb.ServerMessage(save=pb.Save(window=n)), number),
            st.builds(lambda n: pb.ServerMessage(update=pb.UpdateChunk(name="x", offset=n)), number),
        )
    )  # fmt: skip
    wire = bytearray(message.SerializeToString())
    for _ in range(data.draw(st.integers(0, 2))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    try:
        server.trainer.handle(pb.ServerMessage.FromString(bytes(wire)))
    except (WireError, DecodeError):
        return
