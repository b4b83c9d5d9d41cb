"""A client counts for so many times what is typical; fewer than half cannot move what that is."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbert_ds.federation.influence import Vote, most_of_changes, most_of_sums, shrinking, typical

SIZES = st.lists(st.floats(0.1, 10.0), min_size=3, max_size=9)


@given(sizes=st.lists(st.floats(0.0, 1e9), min_size=1, max_size=9))
def test_typical_is_the_lower_median(sizes: list[float]) -> None:
    assert typical(sizes) == statistics.median_low(sizes)
    assert typical([]) == 0.0


@settings(max_examples=60)
@given(honest=SIZES, lies=st.lists(st.sampled_from([0.0, 1e-9, 1e6, 1e300]), max_size=8), times=st.floats(2.0, 20.0))
def test_fewer_than_half_stay_within_what_honest_clients_allow(
    honest: list[float], lies: list[float], times: float
) -> None:
    lies = lies[: len(honest) - 1]
    votes = {f"honest {n}": Vote(size, 100.0) for n, size in enumerate(honest)}
    votes |= {f"liar {n}": Vote(size, 100.0) for n, size in enumerate(lies)}
    for rule in (most_of_changes, most_of_sums):
        most = rule(votes, {}, times)
        for limit in most.values():
            assert times * min(honest) * (1 - 1e-9) <= limit <= times * max(honest) * (1 + 1e-9)


def test_clients_that_send_nothing_now_still_have_their_last_word() -> None:
    others = {"ada": Vote(1.0, 5.0), "bo": Vote(2.0, 5.0), "liar": Vote(1.0, 5.0)}
    assert most_of_changes({"liar": Vote(1e9, 5.0)}, others, 10.0) == {"liar": 20.0}
    assert most_of_changes({"liar": Vote(1e9, 5.0)}, {}, 10.0) == {"liar": 1e10}, "alone, it is what is typical"


def test_a_client_with_little_text_may_send_more_for_each_token_and_one_without_none_at_all() -> None:
    votes = {"large": Vote(40.0, 400.0), "medium": Vote(10.0, 100.0), "small": Vote(0.1, 1.0), "none": Vote(0.0, 0.0)}
    most = most_of_sums(votes, {}, 10.0)
    assert most["large"] == pytest.approx(10 * 0.1 * 400) and most["medium"] == pytest.approx(10 * 0.1 * 100)
    assert most["small"] == pytest.approx(10 * 0.1 * math.sqrt(100.0)), "of noise, the square root adds up"
    assert most["none"] == 0.0


@given(norm=st.floats(0.0, 1e9), most=st.floats(0.0, 1e9))
def test_only_what_is_too_large_shrinks(norm: float, most: float) -> None:
    factor = shrinking(norm, most)
    assert factor == 1.0 if norm <= most else norm * factor == pytest.approx(most)
