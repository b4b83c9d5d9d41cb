"""A window is complete when the last rank has announced it; windows come in order."""

from __future__ import annotations

import pytest

from fedbert_ds.aggregator.expectations import Expectation, Expectations
from fedbert_ds.errors import WireError


def test_the_last_rank_completes_a_window() -> None:
    expectations = Expectations(ranks=2)
    assert expectations.add(1, 0, False, {"cy": 7}) is None
    assert expectations.add(1, 1, False, {"cy": 8}) is None and expectations.complete == -1
    assert expectations.add(0, 0, False, {"ada": 5, "bo": 6}) == Expectation(0, False, {"ada": 5, "bo": 6, "cy": 7})
    assert expectations.complete == 0
    assert expectations.add(0, 1, False, {}) == Expectation(1, False, {"cy": 8})


def test_a_dropped_client_is_expected_in_no_window_that_is_not_complete() -> None:
    expectations = Expectations(ranks=2)
    expectations.add(0, 4, True, {"ada": 1, "bo": 2})
    expectations.drop("ada")
    expectations.drop("bo", delivered={4})
    assert expectations.add(1, 4, True, {"cy": 3}) == Expectation(4, True, {"bo": 2, "cy": 3})


def test_a_rank_announces_in_order_and_as_the_others_do() -> None:
    expectations = Expectations(ranks=2)
    expectations.add(0, 3, True, {})
    with pytest.raises(WireError, match="announced window 3 after window 3"):
        expectations.add(0, 3, True, {})
    with pytest.raises(WireError, match="another way"):
        expectations.add(1, 3, False, {})
    assert expectations.add(1, 3, True, {}) is not None
