"""A client's side of a window: gradients are those of the unsplit computation in any order; it
resumes exactly.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.client.one_client import LENGTHS, VOCABULARY, WIDTH, WORDS, Server, Text, batch_of, half_of, unsplit

from fedbert_ds.config import (
    FederationSection,
    LayersCut,
    ModelSection,
    OptimizerSection,
    WireSection,
)
from fedbert_ds.data.masking import Batch
from fedbert_ds.errors import ConnectionLost, RunError, WireError
from fedbert_ds.federation.aggregator import Aggregator
from fedbert_ds.federation.client_update import update_chunks
from fedbert_ds.federation.reference import Reference, to_bytes
from fedbert_ds.federation.strategy import strategy_of
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import undivided
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import decode, encode

CUTS: list[Any] = ["embeddings", "rows", LayersCut(layers=1)]

# -- one window ------------------------------------------------------------------------------------


def test_the_manifest_counts_what_comes(tmp_path: Path) -> None:
    server = Server(tmp_path, half_of())
    server.give_begin(reference=True)
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
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    got = server.take_update()
    assert not server.answers
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


def test_a_classifiers_dropout_follows_from_the_place_not_from_the_order(tmp_path: Path) -> None:
    """Its head has dropout, which a masked LM's has not."""
    gradients = []
    for order in ([10, 11], [11, 10]):
        server = Server(tmp_path, half_of(dropout=0.5, task=WORDS))
        server.begin()
        server.plan([2], 40)
        for micro_batch in (10, 11):
            server.open(micro_batch)
        got = {}
        for micro_batch in order:
            torch.rand(17)  # somebody else draws in between
            got[micro_batch] = server.hidden(micro_batch).hidden.payload
        gradients.append(got)
    assert gradients[0] == gradients[1]
    server = Server(tmp_path, half_of(dropout=0.0, task=WORDS))
    server.begin()
    server.plan([2], 40)
    server.open(10)
    assert server.hidden(10).hidden.payload != gradients[0][10]


def test_of_a_pair_both_texts_are_embedded_as_such(tmp_path: Path) -> None:
    """The tests of equality say so too, with processes."""

    class Pairs(Text):
        def next_batch(self, window: int, max_tokens: int) -> Batch:
            batch = super().next_batch(window, max_tokens)
            return replace(batch, token_types=torch.arange(len(batch.input_ids)) % 2)

    server = Server(tmp_path, half_of(task=WORDS), Pairs())
    server.begin()
    server.plan([], 40)
    server.open(10)
    batch = Pairs().next_batch(0, 0)
    values = decode(server.values[10].values, (len(batch.input_ids), WIDTH), "fp32", "it")
    assert torch.equal(values, server.half.embed(batch.input_ids, batch.lengths, batch.token_types).values.detach())
    assert not torch.equal(values, server.half.embed(batch.input_ids, batch.lengths).values.detach())


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_classifiers_gradients_are_those_of_the_unsplit_computation(tmp_path: Path, cut: Any) -> None:
    server = Server(tmp_path, half_of(cut, task=WORDS))
    server.begin()
    loss, expected = unsplit(server.half, Text().next_batch(0, 0), masked_tokens=40)
    server.plan([1, 3], 40)
    total = 0.0
    for micro_batch in (10, 11, 12):
        server.open(micro_batch)
    for micro_batch in (11, 12, 10):
        gradient = server.hidden(micro_batch)
        total += gradient.loss_sum
        server.input_gradient(gradient)
    got = server.take_update()
    assert total == pytest.approx(loss, rel=1e-5)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


# -- windows one after another ---------------------------------------------------------------------


def test_nothing_of_the_next_window_is_sent_before_the_half_has_stepped(tmp_path: Path) -> None:
    server = Server(tmp_path, half_of())
    server.begin()
    server.window()
    server.plan([], 40, first=20)
    server.give_credit(20)
    gradients = server.take_update()
    assert not server.answers
    server.give_update(gradients, window=0)
    server.take_activations(20)
    expected = server.half.embed(batch_of(1).input_ids, batch_of(1).lengths).values
    values = decode(server.values[20].values, tuple(expected.shape), "fp32", "it")
    assert torch.equal(values, expected.detach()), "with the weights after the step"


@pytest.mark.parametrize("mode", ["synchronous", "parallel"])
def test_a_client_announces_its_own_windows_and_draws_no_text_for_others(tmp_path: Path, mode: Any) -> None:
    """Windows 0, 1 and 3 are others'; their updates move its half."""
    server = Server(tmp_path, half_of(), federation=FederationSection(mode=mode, average_every=1))
    server.begin(next_window=2)
    manifest = server.take("manifest")
    assert manifest.window == 2 and server.text.cursor == len(LENGTHS)
    server.manifests.insert(0, manifest)
    zeros = {name: torch.zeros(p.shape) for name, p in server.half.named_parameters()}
    others = [{name: tensor + number for name, tensor in zeros.items()} for number in (1.0, 2.0)]
    server.give_update(others[0], window=0)
    server.plan([], 40)
    server.give_credit(10)
    assert not server.answers, "the half is a window behind"
    server.give_update(others[1], window=1)
    server.take_activations(10)
    if mode == "parallel":
        assert all(torch.equal(p.detach(), others[1][name]) for name, p in server.half.named_parameters())


def test_windows_without_this_client_and_without_an_exchange_are_over_at_once(tmp_path: Path) -> None:
    """Rounds of two windows: windows 2 and 3 are others', and the average after 3 is waited for."""
    federation = FederationSection(mode="parallel", average_every=2)
    server = Server(tmp_path, half_of(), federation=federation)
    server.begin()
    server.window()
    server.take("manifest")
    assert server.text.cursor == 2 * len(LENGTHS)
    own = {name: parameter.detach().clone() for name, parameter in server.half.named_parameters()}
    plan = pb.Plan(
        window=1, pieces=[pb.Piece(micro_batch=20, first_sequence=0, num_sequences=4)], next_window=4
    )  # fmt: skip
    server.trainer.handle(pb.ServerMessage(plan=plan))
    assert server.take("manifest").window == 4
    server.trainer.handle(pb.ServerMessage(skipped=pb.Skipped(window=1, micro_batches=[20])))
    server.take_update()
    server.give_update(own, window=1)
    plan = pb.Plan(
        window=4, pieces=[pb.Piece(micro_batch=30, first_sequence=0, num_sequences=4)], next_window=6
    )  # fmt: skip
    server.trainer.handle(pb.ServerMessage(plan=plan))
    server.trainer.handle(pb.ServerMessage(open=pb.Open(window=4, micro_batch=30)))
    assert not server.answers, "the average of windows 2 and 3 is on its way"
    server.give_update(own, window=3)
    assert server.take("activations").micro_batch == 30


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
        server.give_update(server.take_update(), window=0)
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


@pytest.mark.parametrize("federation", [{"mode": "synchronous"}, {"mode": "parallel"},
                                        {"mode": "parallel", "average_every": 10}], ids=str)  # fmt: skip
@pytest.mark.parametrize("updates_first", [False, True])
def test_a_client_that_was_suspended_goes_on_where_the_others_are(
    tmp_path: Path, federation: dict[str, Any], updates_first: bool
) -> None:
    """Windows 1 and 2 were planned without it; their combined updates may come before or after it
    is told.
    """
    server = Server(tmp_path, half_of(), federation=FederationSection(**federation))
    server.begin()
    server.window()
    if exchanges := federation.get("average_every") is None:
        server.give_update(server.take_update(), window=0)
    assert server.take("manifest").window == 1

    def give_updates() -> None:
        for window in (1, 2) if exchanges else ():
            server.give_update({name: torch.zeros_like(p) for name, p in server.half.named_parameters()}, window)

    if updates_first:
        give_updates()
    server.suspend(1, next_window=3)
    server.plan([], 40, first=30)
    server.give_credit(30)
    if exchanges and not updates_first:
        assert not server.answers, "it would be with weights that are about to change"
        give_updates()
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


def test_the_last_window_is_followed_by_none(tmp_path: Path) -> None:
    server = Server(tmp_path, half_of(), windows=1)
    server.begin()
    server.window()
    server.take_update()
    server.give_update({name: torch.zeros_like(p) for name, p in server.half.named_parameters()})
    assert not server.sent and not server.manifests
    server.trainer.handle(pb.ServerMessage(finish=pb.Finish(reason="done", complete=True)))
    assert server.trainer.finish == pb.Finish(reason="done", complete=True)


@pytest.mark.parametrize("parts", ["kept", "averaged"])
@pytest.mark.parametrize("scope", ["embeddings", "head", "embeddings+head"])
def test_for_the_result_a_client_hands_over_nothing_that_is_its_own(tmp_path: Path, scope: str, parts: str) -> None:
    keys = {} if scope == "embeddings+head" else {"personal_parts": parts}
    federation = FederationSection(mode="parallel", average_every=10, average_scope=scope, **keys)
    server = Server(tmp_path, half_of(), windows=1, federation=federation)
    server.begin()
    server.window()
    server.trainer.handle(pb.ServerMessage(update_request=pb.UpdateRequest(window=1)))
    weights = server.take_update()
    names = [name for name, _ in server.half.named_parameters()]
    expected = [name for name in names if parts == "averaged" or server.half.parameter_scope(name) in scope]
    assert sorted(weights) == sorted(expected)


@pytest.mark.parametrize("mode", ["synchronous", "sequential"])
def test_a_half_that_no_result_needs_is_not_handed_over(tmp_path: Path, mode: str) -> None:
    server = Server(tmp_path, half_of(), windows=1, federation=FederationSection(mode=mode))
    server.begin()
    with pytest.raises(WireError, match="asked for this client's half, which the run's result does not need"):
        server.trainer.handle(pb.ServerMessage(update_request=pb.UpdateRequest(window=1)))


# -- where to go on --------------------------------------------------------------------------------


def trained(server: Server, windows: range, average_every: int = 1, reference: Aggregator | None = None) -> None:
    """Windows with an exchange after every `average_every`, each with micro-batches of its own."""
    for window in windows:
        server.window(first=100 * (window + 1))
        if (window + 1) % average_every == 0:
            update = server.take_update()
            server.give_update(update, window)
            if reference is not None:
                reference.apply(window, update)


def equal_weights(one: Server, other: Server) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.half.parameters(), other.half.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["synchronous", "parallel"])
def test_a_resumed_client_goes_on_bit_for_bit(tmp_path: Path, mode: Any) -> None:
    changes = {
        "federation": FederationSection(mode=mode, average_every=3),
        "optimizer": OptimizerSection(lr=0.05, schedule="linear"),
    }
    every = 1 if mode == "synchronous" else 3
    whole = Server(tmp_path / "whole", half_of(dropout=0.2), **changes)
    whole.begin()
    strategy = strategy_of(whole.settings.federation, WireSection())
    reference = Aggregator(whole.weights(), strategy, whole.settings.optimizer, 6)
    trained(whole, range(2), every, reference)
    at_window_2 = reference.reference()
    # The batch of window 2 is drawn already, and window 2 may be planned and have credit.
    whole.trainer.handle(pb.ServerMessage(save=pb.Save(window=2)))
    saved = whole.take("saved")
    assert saved.window == 2 and saved.peak_memory_bytes > 1 << 20 and saved.flops_per_token > 0
    (manifest,) = whole.manifests
    trained(whole, range(2, 5), every)

    again = Server(tmp_path / "whole", half_of(dropout=0.2), **changes)
    again.give_begin(2, cursor=whole.planned[1].cursor, reference=mode == "synchronous")
    if mode == "synchronous":
        assert not again.sent and not (tmp_path / "whole").exists(), "the server keeps its state"
        again.give_reference(at_window_2)
    assert [message.manifest for message in again.sent] == [manifest]
    trained(again, range(2, 5), every)
    assert equal_weights(whole, again)


def no_window(server: Server) -> None:
    """Its manifest is sent."""


def planned(server: Server) -> None:
    server.plan([2], 40, first=90)


def has_credit(server: Server) -> None:
    planned(server)
    server.give_credit(90)


def answered_one_piece(server: Server) -> None:
    planned(server)
    server.open(90)
    server.open(91)
    server.input_gradient(server.hidden(90))
    server.hidden(91)


def planned_the_next_ahead(server: Server) -> None:
    answered_one_piece(server)
    server.plan([], 40, first=95)
    server.give_credit(95)


def skipped_a_piece(server: Server) -> None:
    planned(server)
    server.open(90)
    server.input_gradient(server.hidden(90))
    server.skip(1, 91)


def whole_window(server: Server) -> None:
    server.window(first=90)


def was_suspended(server: Server) -> None:
    server.take("manifest")
    server.suspend(1, next_window=3)


def begins_of_an_update(server: Server) -> None:
    """What others were sent, perhaps; not the whole of it."""
    server.window(first=90)
    chunk, *_ = update_chunks(1, server.weights().items())
    server.trainer.handle(pb.ServerMessage(update=chunk))


PHASES = [no_window, planned, has_credit, answered_one_piece, planned_the_next_ahead, skipped_a_piece,
          whole_window, was_suspended, begins_of_an_update]  # fmt: skip


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("mode", ["synchronous", "parallel"])
def test_a_window_is_undone_in_any_phase_and_trained_anew_bit_for_bit(tmp_path: Path, mode: Any, phase: Any) -> None:
    """Window 1, twice. Where halves are personal, it goes back to the state of its own folder."""
    changes = {
        "federation": FederationSection(mode=mode, average_every=2),
        "optimizer": OptimizerSection(lr=0.05, schedule="linear"),
    }
    every = 1 if mode == "synchronous" else 2
    undisturbed = Server(tmp_path / "undisturbed", half_of(dropout=0.2), **changes)
    undisturbed.begin()
    trained(undisturbed, range(4), every)
    server = Server(tmp_path / "state", half_of(dropout=0.2), **changes)
    server.begin()
    trained(server, range(1), every)
    server.trainer.handle(pb.ServerMessage(save=pb.Save(window=1)))
    server.take("saved")
    cursor = server.planned[0].cursor
    for attempt in (1, 2):
        phase(server)
        server.sent.clear()
        server.manifests.clear()
        server.give_begin(1, attempt=attempt, cursor=cursor)
        (answer,) = server.sent
        assert answer.manifest == undisturbed.planned[1] and server.attempts == [0, 1, 2][: attempt + 1]
    trained(server, range(1, 4), every)
    assert equal_weights(server, undisturbed)


def test_without_a_cursor_the_text_begins_anew(tmp_path: Path) -> None:
    server = Server(tmp_path, half_of())
    server.begin()
    (first,) = server.sent
    planned(server)
    server.sent.clear()
    server.give_begin(0, attempt=1)
    assert server.sent == [first] and server.attempts == [0, 1]


def test_a_begin_ends_a_reference_that_was_on_its_way(tmp_path: Path) -> None:
    server = Server(tmp_path, half_of())
    zeros = {name: torch.zeros_like(tensor) for name, tensor in server.weights().items()}
    ones = {name: torch.ones_like(tensor) for name, tensor in zeros.items()}
    server.give_begin(reference=True)
    data = to_bytes(Reference(0, zeros))
    server.trainer.handle(pb.ServerMessage(reference=pb.ReferenceChunk(payload=data[:100])))
    assert not server.sent
    server.give_begin(1, reference=True, attempt=1)
    server.give_reference(Reference(1, ones))
    (message,) = server.sent
    assert message.manifest.window == 1
    assert all(torch.equal(weights, ones[name]) for name, weights in server.weights().items())


def test_who_joins_while_windows_run_waits_for_their_updates(tmp_path: Path) -> None:
    """The reference is that of window 2; windows 2 and 3 are planned without it."""
    server = Server(tmp_path, half_of())
    server.give_begin(2, next_window=4, reference=True, attempt=7)
    server.give_reference(Reference(2, server.weights()))
    manifest = server.plan([], 40)
    assert manifest.window == 4 and server.attempts == [7]
    server.give_credit(10)
    for window in (2, 3):
        assert not server.answers, "with weights that are about to change"
        server.give_update({name: torch.ones_like(tensor) for name, tensor in server.weights().items()}, window)
    server.take_activations(10)


PERSONAL = {"mode": "parallel", "average_scope": "head", "average_every": 2}


def test_personal_parts_come_from_an_older_state_and_the_others_from_the_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"federation": FederationSection(**PERSONAL), "optimizer": OptimizerSection(lr=0.05)}
    before = Server(tmp_path, half_of(), **changes)
    before.begin()
    trained(before, range(2), average_every=2)
    before.trainer.handle(pb.ServerMessage(save=pb.Save(window=2)))
    kept, cursor = before.weights(), before.planned[1].cursor
    sevens = {name: torch.full_like(tensor, 7.0) for name, tensor in kept.items()}
    server = Server(tmp_path, half_of(), **changes)
    is_averaged = {name: server.half.parameter_scope(name) == "head" for name in kept}
    server.give_begin(4, cursor=cursor, reference=True)
    server.give_reference(Reference(4, sevens))
    for name, weights in server.weights().items():
        assert torch.equal(weights, sevens[name] if is_averaged[name] else kept[name]), name
    assert capsys.readouterr().out == "client ada: in at window 4, with its own parts and moments as of window 2\n"
    # The moments are of window 2, too: it goes on like one that missed windows 2 and 3.
    missed = Server(tmp_path, half_of(), **changes)
    missed.give_begin(2, next_window=4, cursor=cursor)
    missed.give_update({name: sevens[name] for name in sevens if is_averaged[name]}, window=3)
    for one in (missed, server):
        trained(one, range(4, 5), average_every=2)
    assert equal_weights(missed, server)


def test_without_a_folder_personal_parts_begin_anew_and_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(tmp_path / "none", half_of(), federation=FederationSection(**PERSONAL))
    server.give_begin(4, reference=True)
    sevens = {name: torch.full_like(tensor, 7.0) for name, tensor in server.weights().items()}
    server.give_reference(Reference(4, sevens))
    assert all(torch.equal(weights, sevens[name]) for name, weights in server.weights().items())
    said = f"client ada: in at window 4, with no state in {tmp_path / 'none'}: its own parts and moments begin anew\n"
    assert capsys.readouterr().out == said
    server.begin()
    assert capsys.readouterr().out == "", "a new run has nothing to tell"


def test_a_client_without_the_state_of_that_window_is_one_line(tmp_path: Path) -> None:
    server = Server(tmp_path, half_of(), federation=FederationSection(mode="parallel"))
    with pytest.raises(RunError, match=r"state-3\.pt: cannot be read"):
        server.give_begin(3)


def test_a_begin_that_runs_backwards_is_one_line(tmp_path: Path) -> None:
    server = Server(tmp_path, half_of())
    with pytest.raises(WireError, match="goes on with window 2 from a state of 3"):
        server.give_begin(3, next_window=2)


def test_a_reference_from_elsewhere_may_be_newer_than_the_next_window(tmp_path: Path) -> None:
    server = Server(tmp_path, half_of())
    server.give_begin(3, next_window=2, reference=True)
    server.give_reference(Reference(3, server.weights(), {}))
    assert server.take("manifest").window == 2
    server.suspend(2, next_window=4)
    assert server.take("manifest").window == 4
    server.give_update({name: torch.zeros_like(w) for name, w in server.weights().items()}, window=3)
    server.trainer.handle(pb.ServerMessage(save=pb.Save(window=4)))
    assert server.take("saved").window == 4, "it has every window before it"


@pytest.mark.parametrize("may_return", [False, True])
def test_who_is_refused_may_return_if_the_server_says_so(tmp_path: Path, may_return: bool) -> None:
    server = Server(tmp_path, half_of())
    with pytest.raises(WireError, match="this client: it was silent") as caught:
        server.trainer.handle(pb.ServerMessage(refused=pb.Refused(reason="it was silent", may_return=may_return)))
    assert isinstance(caught.value, ConnectionLost) == may_return


# -- a server that is out of step ------------------------------------------------------------------

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
        (pb.ServerMessage(begin=pb.Begin(window=5, next_window=4)), "goes on with window 4 from a state of 5"),
        (pb.ServerMessage(save=pb.Save(window=5)), "the server saves window 5, this client is at 0"),
        (pb.ServerMessage(update=pb.UpdateChunk(name="x")), "tensor 'x' of shape"),
        (pb.ServerMessage(reference=pb.ReferenceChunk(last=True)), "to a client that has one"),
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


def test_no_piece_is_larger_than_the_run_said(tmp_path: Path) -> None:
    """A server cannot take a client's memory by planning all of a window at once."""
    server = Server(tmp_path, half_of(), tokens_per_micro_batch=9)
    server.begin()
    whole = pb.Plan(next_window=1, pieces=[pb.Piece(num_sequences=len(LENGTHS))])
    with pytest.raises(WireError, match=f"plans {sum(LENGTHS)} tokens for micro-batch 0, the run has 9"):
        server.trainer.handle(pb.ServerMessage(plan=whole))


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


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
            st.builds(lambda w, n: pb.ServerMessage(begin=pb.Begin(window=w, next_window=n)), small, small),
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


# -- the whole model -------------------------------------------------------------------------------


def whole_server(folder: Path, average_every: int = 2, **changes: Any) -> Server:
    section = ModelSection(
        num_hidden_layers=2, hidden_size=WIDTH, num_attention_heads=2, max_position_embeddings=8, dropout=0.0
    )
    federation = FederationSection(mode="parallel", average_every=average_every)
    half = undivided(build_model(section, VOCABULARY, 0, seed=5))
    return Server(folder, half, federation=federation, **({"tokens_per_micro_batch": 9} | changes))


def plan_whole(server: Server, window: int) -> None:
    """The whole batch is one piece."""
    manifest = server.planned[window] = server.take("manifest")
    assert manifest.window == window
    whole = pb.Piece(num_sequences=len(manifest.lengths))
    server.trainer.handle(pb.ServerMessage(plan=pb.Plan(window=window, pieces=[whole], next_window=window + 1)))


def run_whole(server: Server, window: int) -> list[pb.Trained]:
    """Let the client train a planned window; its reports."""
    server.trainer.handle(pb.ServerMessage(open=pb.Open(window=window)))
    reports = [server.take("trained")]
    while not reports[-1].last:
        reports.append(server.take("trained"))
    return reports


def test_a_whole_window_is_trained_once_it_runs_and_reported_part_by_part(tmp_path: Path) -> None:
    server = whole_server(tmp_path)
    server.begin()
    expected = copy.deepcopy(server.half)
    plan_whole(server, 0)
    assert not server.answers, "planned is not running"
    reports = run_whole(server, 0)
    batch = batch_of(0)
    loss = expected.whole_backward(batch.input_ids, batch.lengths, batch.masked_positions, batch.labels,
                                   1 / len(batch.labels))  # fmt: skip
    assert len(reports) == 3, "18 tokens in parts of at most 9"
    assert sum(report.loss_sum for report in reports) == pytest.approx(loss, rel=1e-5)
    assert sum(report.masked_tokens for report in reports) == len(batch.labels)
    for (name, mine), theirs in zip(server.half.named_parameters(), expected.parameters(), strict=True):
        step = 0.0 if theirs.grad is None else 0.5 * theirs.grad
        torch.testing.assert_close(mine.detach(), theirs.detach() - step, atol=1e-6, rtol=1e-4, msg=name)
    assert not server.answers, "nothing is exchanged inside a round"


def test_after_a_round_the_change_goes_up_and_the_next_waits_for_the_answer(tmp_path: Path) -> None:
    server = whole_server(tmp_path)
    server.begin()
    start = {name: parameter.detach().clone() for name, parameter in server.half.named_parameters()}
    for window in range(2):
        plan_whole(server, window)
        run_whole(server, window)
    change = server.take_update()
    for name, parameter in server.half.named_parameters():
        assert torch.equal(change[name], parameter.detach() - start[name])
    plan_whole(server, 2)
    server.trainer.handle(pb.ServerMessage(open=pb.Open(window=2)))
    assert not server.answers, "the answer of window 1 is not here"
    before = {name: start[name] + 0.5 for name in start}
    server.give_update({name: torch.full_like(tensor, 0.5) for name, tensor in start.items()}, window=1)
    assert server.take("trained").window == 2
    touched = [name for name, parameter in server.half.named_parameters() if not torch.equal(parameter, before[name])]
    assert touched, "it trained from the new common weights"


def test_a_whole_client_resumes_inside_a_round_bit_for_bit(tmp_path: Path) -> None:
    whole = whole_server(tmp_path / "whole", optimizer=OptimizerSection(name="muon", lr=0.01))
    whole.begin()
    plan_whole(whole, 0)
    run_whole(whole, 0)
    whole.trainer.handle(pb.ServerMessage(save=pb.Save(window=1)))
    saved = whole.take("saved")
    assert saved.flops_per_token > 0
    again = whole_server(tmp_path / "whole", optimizer=OptimizerSection(name="muon", lr=0.01))
    again.give_begin(1, cursor=whole.planned[0].cursor)
    for server in (whole, again):
        plan_whole(server, 1)
        run_whole(server, 1)
    mine, other = whole.take_update(), again.take_update()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_a_window_that_is_not_planned_cannot_run(tmp_path: Path) -> None:
    server = whole_server(tmp_path)
    server.begin()
    with pytest.raises(WireError, match="in which this client has no piece"):
        server.trainer.handle(pb.ServerMessage(open=pb.Open(window=0)))
