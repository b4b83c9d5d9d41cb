"""A window's updates together: exact where all are honest, bounded and robust where some lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fedbert_ds.config import FederationSection
from fedbert_ds.federation import combining
from fedbert_ds.federation.averaging import NobodyDelivered, combine
from fedbert_ds.federation.client_update import ClientUpdate
from fedbert_ds.federation.combining import Combiner, OneProcess

SHAPES = {"bias": (4,), "scale": (), "table": (3, 5)}
ROBUST = ("median", "trimmed_mean", "krum")
HONEST = tuple(f"client-{n}" for n in range(7))


def made(common: Mapping[str, Tensor] | None = None, **federation: Any) -> Combiner:
    section = FederationSection(mode="parallel", **federation)
    one_process = OneProcess(lambda updates: [[update for _, update in sorted(updates.items())]])
    return Combiner(section, SHAPES, one_process, lambda: common or {})


def tensors_of(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}


def updates_of(liars: int = 0, lie: float = -1e3, weight: float = 50.0) -> dict[str, ClientUpdate]:
    """Seven honest clients, all near one update, and liars that send its multiple."""
    truth = tensors_of(99)
    honest = {
        client: ClientUpdate({name: truth[name] + 0.1 * tensor for name, tensor in tensors_of(n).items()}, weight + n)
        for n, client in enumerate(HONEST)
    }
    lies = {name: lie * tensor for name, tensor in truth.items()}
    return honest | {f"liar-{n}": ClientUpdate(lies, weight) for n in range(liars)}


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return sum(float((one[name] - other[name]).square().sum()) for name in SHAPES) ** 0.5


@pytest.mark.parametrize("average", [True, False])
def test_honest_updates_are_combined_as_without_a_bound_to_the_bit(average: bool) -> None:
    updates = updates_of()
    expected = combine(list(updates.values()), SHAPES, average, group=None)
    for bound in (None, 10.0, 2.0):
        combiner = made(bound=bound)
        for _ in range(2):
            got = combiner.combine(updates, average)
            assert all(torch.equal(got[name], expected[name]) for name in SHAPES)
        assert combiner.take_bounded() == []


@pytest.mark.parametrize("average", [True, False])
def test_the_bound_acts_in_the_first_window_and_names_whom_it_acts_on(average: bool) -> None:
    honest = made(bound=4.0).combine(updates_of(), average)
    unbound = made(bound=None).combine(updates_of(liars=1), average)
    combiner = made(bound=4.0)
    bound = combiner.combine(updates_of(liars=1), average)
    ((client, times),) = combiner.take_bounded()
    assert client == "liar-0" and times == pytest.approx(250.0, rel=0.3)
    assert combiner.take_bounded() == []
    assert distance(bound, honest) < distance(unbound, honest) / 100


def test_weights_are_bounded_by_their_change_from_the_weights_before() -> None:
    common = {name: torch.full(shape, 100.0) for name, shape in SHAPES.items()}
    updates = {
        client: ClientUpdate({name: common[name] + tensor for name, tensor in update.tensors.items()}, update.weight)
        for client, update in updates_of(liars=1).items()
    }
    combiner = made(common, bound=4.0)
    got = combiner.combine(updates, average=True)
    assert [client for client, _ in combiner.take_bounded()] == ["liar-0"]
    assert distance(got, common) < 5 * distance(updates["client-0"].tensors, common)
    honest = {client: update for client, update in updates.items() if client in HONEST}
    expected = combine(list(honest.values()), SHAPES, average=True, group=None)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in made(common).combine(honest, True).items())


def test_who_takes_turns_is_bounded_by_what_the_others_sent_last() -> None:
    """And a combiner that goes on from a checkpoint does what the one before would have done."""
    combiner, updates = made(bound=4.0), updates_of(liars=1)
    for client in HONEST:
        combiner.combine({client: updates[client]}, average=True)
    resumed = made(bound=4.0)
    resumed.load_state(combiner.state())
    for one in (combiner, resumed):
        one.combine({"liar-0": updates["liar-0"]}, average=True)
        assert [client for client, _ in one.take_bounded()] == ["liar-0"]
    fresh = made(bound=4.0)
    fresh.combine({"liar-0": updates["liar-0"]}, average=True)
    assert fresh.take_bounded() == [], "nobody else has said what is typical"


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("rule", [*ROBUST, "norm_clipping"])
def test_three_liars_of_ten_hardly_move_a_robust_result(rule: str, average: bool) -> None:
    liars = {"assumed_liars": 3} if rule in ("trimmed_mean", "krum") else {}
    honest = made().combine(updates_of(), average)
    robust = made(combine=rule, **liars).combine(updates_of(liars=3), average)
    size = sum(float(tensor.square().sum()) for tensor in honest.values()) ** 0.5
    if not average:  # a sum is over ten, of whom seven are in `honest`
        honest = {name: tensor * (10 * 53.0) / (7 * 53.0) for name, tensor in honest.items()}
        size *= 10 / 7
    assert distance(robust, honest) < (0.7 if rule == "norm_clipping" else 0.15) * size
    mean = made(bound=None).combine(updates_of(liars=3), average)
    assert distance(mean, honest) > 100 * size


def test_a_sum_by_a_robust_rule_is_the_rule_of_gradients_for_a_token_times_the_tokens() -> None:
    tensors = {n: {name: torch.full(shape, float(n)) for name, shape in SHAPES.items()} for n in (10, 40, 90)}
    updates = {str(n): ClientUpdate(of_n, n / 10) for n, of_n in tensors.items()}  # 10 for each of 1, 4 and 9 tokens
    updates["none"] = ClientUpdate({name: torch.zeros(shape) for name, shape in SHAPES.items()}, 0.0)
    got = made(combine="median").combine(updates, average=False)
    for name, shape in SHAPES.items():
        torch.testing.assert_close(got[name], torch.full(shape, 140.0))


def test_pieces_of_an_update_make_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {rule: made(combine=rule).combine(updates_of(), average=True) for rule in ROBUST}
    monkeypatch.setattr(combining, "PIECE", 4)
    for rule, expected in whole.items():
        got = made(combine=rule).combine(updates_of(), average=True)
        assert all(torch.equal(got[name], expected[name]) for name in SHAPES)


@pytest.mark.parametrize("rule", ["mean", *ROBUST])
def test_of_nobody(rule: str) -> None:
    with pytest.raises(NobodyDelivered):
        made(combine=rule).combine({}, average=True)
    got = made(combine=rule).combine({}, average=False)
    assert all(not tensor.any() for tensor in got.values())


def test_a_half_that_another_is_handed_over_for_moves_the_result_no_further_than_the_bound() -> None:
    """What all have in common after an average stays to the bit; personal parts are averaged."""
    shapes = SHAPES | {"personal": (6,)}
    reference = tensors_of(5) | {"personal": torch.zeros(6)}
    halves = {
        client: ClientUpdate(reference | {"personal": torch.full((6,), 1.0 + n)}, 10.0)
        for n, client in enumerate(HONEST)
    }
    another = {name: torch.full(shape, 1e5) for name, shape in shapes.items()}
    halves["!"] = ClientUpdate(another, 10.0)
    got = made(bound=3.0).result(halves, shapes, reference)
    assert all(torch.equal(got[name], reference[name]) for name in SHAPES)
    assert float(got["personal"].max()) <= (sum(range(1, 8)) + 3.0 * 4.0) / 8 + 1e-6
    del halves["!"]
    honest = made().result(halves, shapes, reference)
    expected = combine(list(halves.values()), shapes, average=True, group=None)
    assert all(torch.equal(honest[name], expected[name]) for name in shapes) and list(honest) == list(shapes)
