"""A client's evaluation: the loss of the same half in one piece, and nothing is moved by it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from unit.client.one_client import VOCABULARY, WIDTH, WORDS, Server, Text, half_of

from fedbert_ds.client.evaluation import HeldOutEvaluation
from fedbert_ds.client.whole_window import bounds, parts_of
from fedbert_ds.config import ModelSection, WireSection
from fedbert_ds.data.masking import Batch
from fedbert_ds.errors import WireError
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import undivided
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import decode, decode_positions, decode_row_index, encode

DEVICE = torch.device("cpu")
TEXT = Text().next_batch(40, 0)


class Body:
    """The server's side: hidden states are the activations asked back."""

    def __init__(self, half: Any, text: Batch | None = TEXT, capacity: int = 9) -> None:
        self.sent: list[pb.ClientMessage] = []
        self.evaluation = HeldOutEvaluation(half, text, WireSection(), capacity, DEVICE, self.sent.append)

    def answer(self) -> list[pb.Evaluated]:
        """Answer parts until none is sent; at most two are on their way. Returns the reports."""
        reports, waiting = [], []
        while self.sent or waiting:
            while self.sent:
                message = self.sent.pop(0)
                if message.HasField("evaluated"):
                    reports.append(message.evaluated)
                else:
                    waiting.append(message.activations)
            assert len(waiting) <= 2
            if waiting:
                self.evaluation.hidden(self.hidden(waiting.pop(0)))
        return reports

    def hidden(self, message: pb.Activations) -> pb.Hidden:
        tokens = sum(message.held_out_lengths)
        masked = int.from_bytes(message.masked_positions, "big").bit_count()
        values = decode(message.values, tuple(message.values.shape), "fp32", "it")
        if message.row_index:
            values = values[decode_row_index(message.row_index, tokens, len(values), "it")]
        rows = values[decode_positions(message.masked_positions, tokens, masked, "it")]
        place = {"window": message.window, "micro_batch": message.micro_batch}
        return pb.Hidden(**place, values=encode(rows, "fp32"), held_out=True)


@pytest.mark.parametrize("cut", ["embeddings", "rows"])
def test_parts_give_the_loss_of_the_text_in_one_piece_without_dropout(cut: str) -> None:
    half = half_of(cut, dropout=0.5)
    state = copy.deepcopy(half.state_dict())
    body = Body(half)
    random = torch.get_rng_state()
    body.evaluation.begin(7)
    reports = body.answer()
    assert torch.equal(torch.get_rng_state(), random), "no random number is drawn"
    assert half.training and all(module.training for module in half.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in half.state_dict().items())
    assert all(parameter.grad is None for parameter in half.parameters())
    assert len(reports) == len(list(parts_of(TEXT, 9))) > 2
    assert [report.last for report in reports] == [False] * (len(reports) - 1) + [True]
    assert {report.window for report in reports} == {7}
    assert sum(report.masked_tokens for report in reports) == len(TEXT.labels)
    half.eval()
    with torch.no_grad():
        activations = half.embed(TEXT.input_ids, TEXT.lengths)
        index = activations.row_index
        values = activations.values if index is None else activations.values[index.long()]
        expected = half.head_loss(values[TEXT.masked_positions], TEXT.labels)
    assert sum(report.loss_sum for report in reports) == pytest.approx(expected, rel=1e-6)


def test_a_client_with_the_whole_model_needs_no_body() -> None:
    section = ModelSection(
        num_hidden_layers=2, hidden_size=WIDTH, num_attention_heads=2, max_position_embeddings=8, dropout=0.5
    )
    half = undivided(build_model(section, VOCABULARY, 0, seed=5)).train()
    body = Body(half)
    random = torch.get_rng_state()
    body.evaluation.begin(7)
    reports = body.answer()
    assert torch.equal(torch.get_rng_state(), random) and half.training
    with torch.no_grad():
        hidden = half.eval().whole_hidden(TEXT.input_ids, TEXT.lengths, TEXT.masked_positions)
    expected = half.head_loss(hidden, TEXT.labels)
    assert sum(report.loss_sum for report in reports) == pytest.approx(expected, rel=1e-6)
    assert sum(report.masked_tokens for report in reports) == len(TEXT.labels) and reports[-1].last
    assert all(parameter.grad is None for parameter in half.parameters())


@pytest.mark.parametrize("cut", ["embeddings", "rows", "whole"])
def test_counts_of_a_task_add_up_to_those_of_the_text_in_one_piece(cut: str) -> None:
    """Over parts, whose sequences stay apart: an entity does not reach into the next one."""
    half = half_of(cut, dropout=0.5, task=WORDS) if cut != "whole" else whole_half()
    body = Body(half)
    body.evaluation.begin(7)
    reports = body.answer()
    assert len(reports) == len(list(parts_of(TEXT, 9))) > 2
    counts = [sum(values) for values in zip(*(report.counts for report in reports), strict=True)]
    half.eval()
    with torch.no_grad():
        if cut == "whole":
            hidden = half.whole_hidden(TEXT.input_ids, TEXT.lengths, TEXT.masked_positions)
        else:
            activations = half.embed(TEXT.input_ids, TEXT.lengths)
            index = activations.row_index
            hidden = (activations.values if index is None else activations.values[index.long()])[TEXT.masked_positions]
        scores = half.logits(hidden)
    expected = WORDS.counts(scores, TEXT.labels, bounds(TEXT)[1])
    assert counts == expected and expected != WORDS.counts(scores, TEXT.labels, [0, len(TEXT.labels)])


def whole_half() -> Any:
    section = ModelSection(
        num_hidden_layers=2, hidden_size=WIDTH, num_attention_heads=2, max_position_embeddings=8, dropout=0.5
    )
    return undivided(build_model(section, VOCABULARY, 0, seed=5, task=WORDS)).train()


def test_without_held_out_text_it_says_so_at_once() -> None:
    body = Body(half_of(), None)
    body.evaluation.begin(7)
    assert body.answer() == [pb.Evaluated(window=7, last=True)]


def test_hidden_states_that_were_not_asked_for_are_refused() -> None:
    body = Body(half_of())
    body.evaluation.begin(7)
    first = body.sent[0].activations
    with pytest.raises(WireError, match="unasked"):
        body.evaluation.hidden(body.hidden(body.sent[1].activations))
    body.evaluation.cancel()
    with pytest.raises(WireError, match="held-out part 0, unasked"):
        body.evaluation.hidden(body.hidden(first))


def test_it_waits_for_the_update_that_is_on_its_way(tmp_path: Path) -> None:
    """As with an aggregator of another party, whose messages come in another stream."""
    server = Server(tmp_path, half_of())
    server.begin()
    server.window()
    update = server.take_update()
    server.trainer.handle(pb.ServerMessage(evaluate=pb.Evaluate(window=1)))
    assert not server.answers, "its half has not taken the step of window 0"
    server.give_update(update)
    assert [message.WhichOneof("body") for message in server.answers] == ["evaluated"]


def test_a_roll_back_forgets_it(tmp_path: Path) -> None:
    server = Server(tmp_path, half_of())
    server.begin()
    server.window()
    update = server.take_update()
    server.trainer.handle(pb.ServerMessage(evaluate=pb.Evaluate(window=1)))
    server.sent.clear()  # of the window that is undone
    server.manifests.clear()
    server.give_begin(0, attempt=1)
    server.window(first=20)
    server.take_update()
    server.give_update(update)
    assert not server.answers
