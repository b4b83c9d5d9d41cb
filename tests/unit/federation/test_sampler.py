"""Who takes part: how many, how often, the same for everybody, whatever the order of names."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbert_ds.config import FederationSection, WireSection
from fedbert_ds.federation.sampler import Everybody, Members, Sample, Sampler, Turns, drawn
from fedbert_ds.federation.strategy import strategy_of

NAMES = st.lists(st.text("abcxyz0189-", min_size=1, max_size=6), min_size=1, max_size=9, unique=True)


def of(members: Members, mode: str = "synchronous", seed: int = 1, every: int = 1, m: int | str = "all") -> Sampler:
    """The sampler of a run file."""
    federation = FederationSection(mode=mode, average_every=every, participants=m)  # type: ignore[arg-type]
    return strategy_of(federation, WireSection()).sampler(seed, members)


def participants(sampler: Sampler, members: Members, window: int) -> list[str]:
    return sorted(name for name in members if sampler.takes_part(name, window))


@settings(max_examples=100)
@given(names=NAMES, count=st.integers(1, 12), seed=st.integers(0, 2**40), every=st.integers(1, 5))
def test_each_round_has_m_of_k_and_all_its_windows_the_same(
    names: list[str], count: int, seed: int, every: int
) -> None:
    members = dict.fromkeys(names, 0)
    summed, averaged = of(members, "synchronous", seed, every, count), of(members, "parallel", seed, every, count)
    for round_ in range(6):
        chosen = [participants(averaged, members, window) for window in range(round_ * every, (round_ + 1) * every)]
        assert chosen == chosen[:1] * every
        assert len(chosen[0]) == min(count, len(names))
        # A window is a round of `synchronous` mode.
        assert participants(summed, members, round_) == chosen[0]


@settings(max_examples=60)
@given(names=NAMES, count=st.integers(1, 9), seed=st.integers(0, 99), order=st.randoms(use_true_random=False))
def test_neither_the_order_of_names_nor_what_was_asked_before_matters(
    names: list[str], count: int, seed: int, order: random.Random
) -> None:
    """So every rank, and every resumed run, draws the same."""
    other = list(names)
    order.shuffle(other)
    for mode, m in (("synchronous", count), ("parallel", count), ("sequential", "all")):
        one = of(dict.fromkeys(names, 0), mode, seed, 2, m)
        expected = [participants(one, dict.fromkeys(names, 0), window) for window in range(20)]
        resumed = of(dict.fromkeys(other, 0), mode, seed, 2, m)
        windows = list(range(20))
        order.shuffle(windows)
        for window in windows:
            assert participants(resumed, dict.fromkeys(other, 0), window) == expected[window], (mode, window)


@pytest.mark.parametrize(("total", "count"), [(4, 2), (5, 1), (7, 3), (6, 5)])
def test_every_client_and_every_set_of_them_is_as_likely(total: int, count: int) -> None:
    """Within four standard deviations of a fair draw, which one in 16,000 fair samplers misses."""
    rounds = 6000
    sets = Counter(drawn(3, round_, count, total) for round_ in range(rounds))
    share = 1 / math.comb(total, count)
    assert len(sets) == math.comb(total, count)
    for chosen, times in sets.items():
        assert abs(times - rounds * share) < 4 * math.sqrt(rounds * share * (1 - share)), chosen
    for client in range(total):
        often = sum(times for chosen, times in sets.items() if client in chosen)
        fair = count / total
        assert abs(often - rounds * fair) < 4 * math.sqrt(rounds * fair * (1 - fair)), client


def test_another_seed_draws_others() -> None:
    members = dict.fromkeys("abcdefgh", 0)
    draws = {
        seed: [tuple(participants(of(members, seed=seed, m=3), members, window)) for window in range(8)]
        for seed in range(5)
    }
    assert len({tuple(draw) for draw in draws.values()}) == 5


def test_the_draws_of_a_release_are_those_of_the_next() -> None:
    """A run that is resumed with a newer version goes on with the same participants."""
    assert [sorted(drawn(1, round_, 2, 4)) for round_ in range(6)] == [
        [1, 3], [0, 1], [0, 3], [1, 2], [1, 3], [0, 2]
    ]  # fmt: skip


def test_all_take_part_unless_the_run_file_says_otherwise() -> None:
    members = dict.fromkeys(("ada", "bo"), 0)
    for mode in ("synchronous", "parallel"):
        sampler = of(members, mode, every=3)
        assert all(participants(sampler, members, window) == ["ada", "bo"] for window in range(7))


@settings(max_examples=60)
@given(names=NAMES, every=st.integers(1, 4))
def test_turns_go_round_in_the_order_of_names(names: list[str], every: int) -> None:
    members = dict.fromkeys(names, 0)
    sampler = of(members, "sequential", every=every)
    expected = sorted(names)
    for window in range(3 * every * len(names)):
        assert participants(sampler, members, window) == [expected[window // every % len(names)]]


# -- clients that join later -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["everybody", "sample", "turns"])
def test_who_joins_in_the_middle_takes_part_from_the_next_round_and_changes_nothing_before(kind: str) -> None:
    early, members = dict.fromkeys(("ada", "cy"), 0), {"ada": 0, "bo": 7, "cy": 0}

    def make(who: Members) -> Sampler:
        if kind == "turns":
            return Turns(who, 3)
        return Everybody(who, 3) if kind == "everybody" else Sample(who, 3, 2, seed=5)

    before, after = make(early), make(members)
    for window in range(9):  # 7 lies in the round of windows 6 to 8
        assert participants(after, members, window) == participants(before, early, window)
    assert any(after.takes_part("bo", window) for window in range(9, 30))
    assert not any(before.takes_part("bo", window) for window in range(30)), "it is no member"


def test_turns_go_on_where_they_were_when_somebody_joins() -> None:
    members = {"ada": 0, "bo": 3, "cy": 0, "di": 0}
    sampler = Turns(members, 1)
    turns = "".join(participants(sampler, members, window)[0][0] for window in range(10))
    assert turns == "acd" + "abcdabc"


def test_before_anybody_counts_nobody_takes_part() -> None:
    members = {"ada": 2, "bo": 4}
    for sampler in (Everybody(members, 1), Sample(members, 1, 1, 0), Turns(members, 1)):
        assert [len(participants(sampler, members, window)) for window in range(2)] == [0, 0]
        assert participants(sampler, members, 2) == ["ada"]


@settings(max_examples=200)
@given(
    members=st.dictionaries(st.text("abcxyz", min_size=1, max_size=3), st.integers(0, 30), min_size=1, max_size=9),
    every=st.integers(1, 4),
    order=st.randoms(use_true_random=False),
)
def test_turns_are_those_of_going_from_round_to_round(members: Members, every: int, order: random.Random) -> None:
    expected: list[str | None] = []
    for round_ in range(40 // every):
        names = sorted(name for name, first in members.items() if first <= round_ * every)
        last = expected[-1] if expected else None
        later = [name for name in names if last is not None and name > last]
        expected.append((later or names or [None])[0])
    sampler = Turns(members, every)
    windows = list(range(len(expected) * every))
    order.shuffle(windows)
    for window in windows:
        told = [name for name in members if sampler.takes_part(name, window)]
        assert told == [name for name in [expected[window // every]] if name is not None]


def test_a_turn_far_ahead_is_told_at_once() -> None:
    sampler = Turns({"ada": 0, "bo": 10, "cy": 0}, 1)
    turns = [name for window in range(3) for name in ("ada", "bo", "cy") if sampler.takes_part(name, 10**15 + window)]
    assert sorted(turns) == ["ada", "bo", "cy"]
