"""The rules of a federated mode: what is exchanged after each window, of which parts, how coded,
and whose result.
"""

from __future__ import annotations

from typing import Any

import pytest

from fedbert_ds.config import FederationSection, RunConfig, WireSection
from fedbert_ds.federation.strategy import Strategy, strategy_of, strategy_of_run


def strategy(wire: WireSection | None = None, cut: Any = "embeddings", **federation: Any) -> Strategy:
    return strategy_of(FederationSection(**federation), wire or WireSection(), cut)


def whole(wire: WireSection | None = None, **federation: Any) -> Strategy:
    return strategy(wire, "whole", mode="parallel", **federation)


@pytest.mark.parametrize(
    ("mode", "average_every", "expected"),
    [
        ("synchronous", 1, ["gradients"] * 6),
        ("synchronous", 3, ["gradients"] * 6),  # average_every is for `parallel`
        ("parallel", 1, ["weights"] * 6),
        ("parallel", 2, ["nothing", "weights"] * 3),
        ("parallel", 3, ["nothing", "nothing", "weights"] * 2),
        ("parallel", 7, ["nothing"] * 6),
        ("sequential", 3, ["nothing", "nothing", "weights"] * 2),  # when a turn ends
    ],
)
def test_exchange_after_each_window(mode: str, average_every: int, expected: list[str]) -> None:
    rule = strategy(mode=mode, average_every=average_every)
    assert [rule.exchange_after(window) for window in range(6)] == expected


@pytest.mark.parametrize(("mode", "average_every"), [("synchronous", 3), ("parallel", 1), ("parallel", 4)])
def test_exchanges_per_window_counts_them(mode: str, average_every: int) -> None:
    rule = strategy(mode=mode, average_every=average_every)
    exchanges = sum(rule.exchange_after(window) != "nothing" for window in range(12))
    assert rule.exchanges_per_window == exchanges / 12


@pytest.mark.parametrize(
    ("mode", "average_scope", "embeddings", "head"),
    [
        ("parallel", "embeddings", True, False),
        ("parallel", "head", False, True),
        ("parallel", "embeddings+head", True, True),
        # One model: all of it, whatever the scope says.
        ("synchronous", "embeddings", True, True),
        ("synchronous", "head", True, True),
        ("synchronous", "embeddings+head", True, True),
        # The next client takes over all of it.
        ("sequential", "embeddings", True, True),
        ("sequential", "head", True, True),
    ],
)
def test_which_parts_take_part(mode: str, average_scope: str, embeddings: bool, head: bool) -> None:
    rule = strategy(mode=mode, average_scope=average_scope)
    assert (rule.takes_part("embeddings"), rule.takes_part("head")) == (embeddings, head)


@pytest.mark.parametrize("mode", ["synchronous", "parallel", "sequential"])
def test_updates_are_coded_as_the_run_file_says(mode: str) -> None:
    assert strategy(WireSection(updates="int8"), mode=mode).update_codec == "int8"
    assert strategy(mode=mode).update_codec == "fp32"


@pytest.mark.parametrize(
    ("mode", "codec", "expected"),
    [
        ("parallel", "fp32", False),
        ("parallel", "bf16", True),
        ("parallel", "int8", True),
        ("synchronous", "fp32", False),
        ("synchronous", "int8", False),
        ("sequential", "fp32", False),
        ("sequential", "int8", True),
    ],
)
def test_only_coded_weights_are_sent_as_changes(mode: str, codec: Any, expected: bool) -> None:
    assert strategy(WireSection(updates=codec), mode=mode).sends_changes == expected


def test_halves_that_step_alone_are_personal() -> None:
    assert strategy(mode="parallel").halves_are_personal
    assert strategy(mode="sequential").halves_are_personal, "moments of its own"
    assert not strategy(mode="synchronous").halves_are_personal


def test_the_result_is_the_reference_but_where_parts_may_be_personal() -> None:
    assert strategy(mode="synchronous").result_is_reference
    assert strategy(mode="sequential").result_is_reference
    assert not strategy(mode="parallel").result_is_reference


@pytest.mark.parametrize(
    ("federation", "members", "expected"),
    [
        ({"mode": "synchronous"}, 7, 7),
        ({"mode": "synchronous", "participants": 3}, 7, 3),
        ({"mode": "parallel", "participants": 3}, 2, 2),
        ({"mode": "parallel"}, 5, 5),
        ({"mode": "sequential"}, 5, 1),
    ],
)
def test_as_many_take_part_as_is_said(federation: dict[str, Any], members: int, expected: int) -> None:
    rule = strategy(**federation)
    assert rule.num_participants(members) == expected
    names = [f"c{number}" for number in range(members)]
    sampler = rule.sampler(1, dict.fromkeys(names, 0))
    for window in range(8):
        assert sum(sampler.takes_part(name, window) for name in names) == expected


def test_only_summed_gradients_must_reach_every_client() -> None:
    assert strategy(mode="synchronous").needs_every_window
    assert not strategy(mode="parallel").needs_every_window
    assert not strategy(mode="sequential").needs_every_window


def test_clients_of_the_whole_model_train_alone_and_send_every_change_of_all_of_it() -> None:
    rule = whole(average_every=3)
    assert [rule.exchange_after(window) for window in range(6)] == ["nothing", "nothing", "weights"] * 2
    assert rule.trains_alone and rule.sends_changes and rule.halves_are_personal and not rule.clips_together
    assert rule.takes_part("embeddings") and rule.takes_part("head")
    assert rule.result_is_reference, "a round ends with every client at the reference"
    assert not strategy(mode="parallel").trains_alone and not strategy(mode="synchronous").trains_alone


@pytest.mark.parametrize(("mode", "expected"), [("synchronous", True), ("parallel", False)])
def test_whose_model_the_result_is(mode: str, expected: bool) -> None:
    assert strategy(mode=mode).result_is_reference == expected


def test_what_rounding_takes_from_an_answer_is_kept_where_it_is_much_or_all_there_is() -> None:
    kept = {codec: strategy(WireSection(updates=codec), mode="parallel").keeps_rounding
            for codec in ("fp32", "int8", "int2_hadamard")}  # fmt: skip
    assert kept == {"fp32": False, "int8": False, "int2_hadamard": True}
    assert not whole().keeps_rounding and whole(WireSection(updates="int8")).keeps_rounding
    assert not strategy(WireSection(updates="int8"), mode="synchronous").keeps_rounding


def test_the_cut_of_a_run_file_decides_with_its_sections() -> None:
    """Whole models are averaged by another strategy than halves are."""
    sections: Any = {"federation": {"mode": "parallel", "average_every": 3}}
    assert strategy_of_run(RunConfig(**sections, cut="whole")) == whole(average_every=3)
    assert strategy_of_run(RunConfig(**sections)) == strategy(mode="parallel", average_every=3)
