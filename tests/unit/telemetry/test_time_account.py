"""Where the time goes: whatever blocks lie in one another, the parts are the wall time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.telemetry import time_account
from fedbert_ds.telemetry.time_account import Part, TimeAccount

SECONDS = st.integers(0, 100)
BLOCKS = st.recursive(SECONDS, lambda inside: st.tuples(st.sampled_from(get_args(Part)), st.lists(inside, max_size=4)))


@given(st.lists(BLOCKS, max_size=8), st.lists(BLOCKS, max_size=4))
def test_every_moment_is_charged_once_to_the_innermost_block(first: list[Any], second: list[Any]) -> None:
    clock = SimpleNamespace(now=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time_account, "time", SimpleNamespace(monotonic=lambda: clock.now))
        account = TimeAccount()
        for blocks in (first, second):
            expected: dict[str, int] = {}
            spend(account, clock, blocks, "work", expected)
            taken = account.take()
            assert {part: spent for part, spent in taken.items() if spent} == expected


def spend(account: TimeAccount, clock: Any, blocks: list[Any], part: str, expected: dict[str, int]) -> None:
    for block in blocks:
        if isinstance(block, int):
            clock.now += block
            if block:
                expected[part] = expected.get(part, 0) + block
        else:
            inner, inside = block
            with account.charged(inner):
                # An evaluation has all of its own time.
                spend(account, clock, inside, part if part == "evaluating" else inner, expected)


def test_time_that_an_error_ends_is_charged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time_account, "time", SimpleNamespace(monotonic=lambda: clock.now))
    account = TimeAccount()
    with pytest.raises(ValueError), account.charged("saving"):
        clock.now = 3.0
        raise ValueError
    clock.now = 5.0
    assert account.take() == {"work": 2.0, "saving": 3.0}
