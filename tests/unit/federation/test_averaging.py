"""Sums and averages of updates equal plain fp64 arithmetic, on one rank and over two."""

from __future__ import annotations

import multiprocessing
import queue
from datetime import timedelta
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedbert_ds.federation.averaging import NobodyDelivered, combine, combine_ranks
from fedbert_ds.federation.client_update import ClientUpdate

SHAPES = {"table": (3, 4), "bias": (4,), "scale": ()}


def tensors_of(seed: int, size: float = 1.0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) * size for name, shape in SHAPES.items()}


def plain(updates: list[ClientUpdate], average: bool) -> dict[str, Tensor]:
    """The definition, in Python's own doubles."""
    result = {}
    for name, shape in SHAPES.items():
        values = [tensors[name].flatten().tolist() for tensors, _ in updates]
        weights = [weight if average else 1.0 for _, weight in updates]
        sums = [sum(w * v for w, v in zip(weights, column, strict=True)) for column in zip(*values, strict=True)]
        divisor = sum(weights) if average else 1.0
        result[name] = torch.tensor([s / divisor for s in sums], dtype=torch.float64).view(shape)
    return result


def assert_nearest(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """fp32 values next to the fp64 ones."""
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype is torch.float32
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-7, atol=1e-12)


@settings(max_examples=60)
@given(
    weights=st.lists(st.floats(0.5, 1e6), min_size=1, max_size=6),
    average=st.booleans(),
    size=st.sampled_from([1e-6, 1.0, 1e5]),
)
def test_one_rank_is_plain_arithmetic(weights: list[float], average: bool, size: float) -> None:
    updates = [ClientUpdate(tensors_of(seed, size), weight) for seed, weight in enumerate(weights)]
    before = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors, _ in updates]
    assert_nearest(combine(updates, SHAPES, average, group=None), plain(updates, average))
    for (tensors, _), old in zip(updates, before, strict=True):
        assert all(torch.equal(tensors[name], old[name]) for name in SHAPES), "arguments are left alone"


@settings(max_examples=60)
@given(
    weight=st.just(0.0) | st.floats(1e-3, 2.0**53),
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8),
)
def test_one_update_comes_back_bit_for_bit(weight: float, values: list[float]) -> None:
    tensor = torch.tensor(values)
    combined = combine([ClientUpdate({"it": tensor}, weight)], {"it": tensor.shape}, average=True, group=None)
    # Only the sign of a zero may go: 0.0 + -0.0 is 0.0.
    assert torch.equal(combined["it"], tensor)


@settings(max_examples=60)
@given(weights=st.lists(st.just(0.0) | st.floats(1e-3, 1e9), min_size=1, max_size=6))
def test_the_weights_of_an_average_sum_to_one(weights: list[float]) -> None:
    """So the average of equal updates is that update."""
    updates = [ClientUpdate(tensors_of(1), weight) for weight in weights]
    assert_nearest(combine(updates, SHAPES, average=True, group=None), plain(updates[:1], average=False))


@settings(max_examples=30)
@given(order=st.permutations(range(5)), average=st.booleans())
def test_permuting_clients_changes_nothing_but_rounding(order: list[int], average: bool) -> None:
    """To the bit, too, where it matters: the exchange hands updates over by the names of their
    clients.
    """
    updates = [ClientUpdate(tensors_of(seed), 1.0 + seed) for seed in range(5)]
    one = combine(updates, SHAPES, average, group=None)
    assert_nearest(combine([updates[i] for i in order], SHAPES, average, group=None), plain(updates, average))
    assert_nearest(one, plain(updates, average))


def test_a_heavier_update_pulls_more() -> None:
    updates = [ClientUpdate({"it": torch.tensor([1.0])}, 3.0), ClientUpdate({"it": torch.tensor([5.0])}, 1.0)]
    assert combine(updates, {"it": (1,)}, average=True, group=None)["it"].item() == 2.0
    assert combine(updates, {"it": (1,)}, average=False, group=None)["it"].item() == 6.0


def test_updates_without_any_weight_weigh_the_same() -> None:
    updates = [ClientUpdate({"it": torch.tensor([1.0])}, 0.0), ClientUpdate({"it": torch.tensor([5.0])}, 0.0)]
    assert combine(updates, {"it": (1,)}, average=True, group=None)["it"].item() == 3.0


def test_a_sum_is_kept_in_fp64() -> None:
    """In fp32 the small update would be lost beside the large one."""
    values = [1e6, 0.03125, -1e6]
    updates = [ClientUpdate({"it": torch.tensor([value])}, 1.0) for value in values]
    assert combine(updates, {"it": (1,)}, average=False, group=None)["it"].item() == 0.03125


def test_nobody_at_all_sums_to_nothing_and_has_no_average() -> None:
    """Zeros would be taken for weights."""
    with pytest.raises(NobodyDelivered):
        combine([], SHAPES, average=True, group=None)
    combined = combine([], SHAPES, average=False, group=None)
    assert {name: tuple(tensor.shape) for name, tensor in combined.items()} == SHAPES
    assert not any(tensor.any() for tensor in combined.values())


# -- two ranks -------------------------------------------------------------------------------------

CASES: list[tuple[bool, list[list[tuple[int, float]]]]] = [
    (True, [[(0, 3.0), (1, 5.0)], [(2, 11.0)]]),
    (False, [[(0, 3.0), (1, 5.0)], [(2, 11.0)]]),
    (True, [[], [(3, 7.0)]]),  # a rank without clients takes part
    (True, [[(4, 0.0)], [(5, 0.0), (6, 0.0)]]),
    (True, [[], []]),
]
"""(average, for each rank the seeds and weights of its updates)."""


def _rank(rank: int, store: str, answers: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    group = torch.distributed.group.WORLD
    results: list[dict[str, Any] | None] = []
    for average, ranks in CASES:
        updates = [ClientUpdate(tensors_of(seed), weight) for seed, weight in ranks[rank]]
        try:
            results.append({name: t.tolist() for name, t in combine(updates, SHAPES, average, group).items()})
        except NobodyDelivered:
            results.append(None)
    answers.put((rank, results))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each of two gloo processes gets for every case."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    store = str(tmp_path_factory.mktemp("gloo") / "store")
    processes = [context.Process(target=_rank, args=(rank, store, answers), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        return dict(answers.get(timeout=90) for _ in processes)
    except queue.Empty:
        pytest.fail(f"no answer; exit codes {[process.exitcode for process in processes]}")
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()


@pytest.mark.parametrize("case", range(len(CASES)))
def test_two_ranks_are_plain_arithmetic_over_all_updates(case: int, two_ranks: dict[int, list[dict[str, Any]]]) -> None:
    average, ranks = CASES[case]
    assert two_ranks[0][case] == two_ranks[1][case], "both ranks get the same, bit for bit"
    everybody = [ClientUpdate(tensors_of(seed), weight) for mine in ranks for seed, weight in mine]
    if not everybody:
        assert two_ranks[0][case] is None
        return
    got = {name: torch.tensor(values).view(SHAPES[name]) for name, values in two_ranks[0][case].items()}
    if not any(weight for _, weight in everybody):
        everybody = [ClientUpdate(tensors, 1.0) for tensors, _ in everybody]
    assert_nearest(got, plain(everybody, average))
    if len(everybody) == 1:
        assert all(torch.equal(got[name], everybody[0][0][name]) for name in SHAPES)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_one_process_combines_two_ranks_bit_for_bit_as_they_do(
    case: int, two_ranks: dict[int, list[dict[str, Any]]]
) -> None:
    average, ranks = CASES[case]
    updates = [[ClientUpdate(tensors_of(seed), weight) for seed, weight in mine] for mine in ranks]
    if two_ranks[0][case] is None:
        with pytest.raises(NobodyDelivered):
            combine_ranks(updates, SHAPES, average)
        return
    assert {name: t.tolist() for name, t in combine_ranks(updates, SHAPES, average).items()} == two_ranks[0][case]


@settings(max_examples=30)
@given(weights=st.lists(st.just(0.0) | st.floats(1e-3, 1e9), max_size=5), average=st.booleans())
def test_one_rank_in_one_process_is_one_rank(weights: list[float], average: bool) -> None:
    updates = [ClientUpdate(tensors_of(seed), weight) for seed, weight in enumerate(weights)]
    if average and not updates:
        return
    one, other = combine(updates, SHAPES, average, group=None), combine_ranks([updates], SHAPES, average)
    assert all(torch.equal(one[name], other[name]) for name in SHAPES)
