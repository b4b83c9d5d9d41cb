"""A slice of simulated schedules, and proof that they find faults; schedules.py plays a million."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator

import pytest
from simulation.draw import draw
from simulation.mutations import FAULTS, SEEDS, applied, may_show
from simulation.play import Play, simulated
from simulation.schedules import played

pytestmark = pytest.mark.timeout(900)

SECONDS = 20.0
FEWEST = 100
"""Schedules, however slow the machine is."""
MOST = 1500
"""Schedules in which a fault must show."""


def test_whatever_comes_and_goes_every_sum_is_exact() -> None:
    """A failure names its seed: python tests/simulation/schedules.py --seed SEED."""
    started, seed, done = time.monotonic(), random.randrange(10**9), 0
    with simulated():
        while done < FEWEST or time.monotonic() - started < SECONDS:
            counts = played(range(seed + done, seed + done + 20))
            assert not counts.failures, counts.failures
            done += counts.schedules


def test_a_seed_is_a_schedule() -> None:
    """Played twice, the same happens at the same time."""
    with simulated():
        for seed in range(20):
            first, second = Play(draw(seed)), Play(draw(seed))
            first.run()
            second.run()
            assert (first.world.now, first.world.num_events) == (second.world.now, second.world.num_events)
            assert first.told == second.told


def test_schedules_that_failed_once_do_not_now() -> None:
    with simulated():
        for seed in SEEDS.values():
            assert not played(range(seed, seed + 1)).failures


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_rooms_is_found(name: str) -> None:
    with simulated(), applied(name):
        seeds = iter([SEEDS[name]]) if name in SEEDS else _that_may_show(name)
        for seed in itertools.islice(seeds, MOST):
            if played(range(seed, seed + 1)).failures:
                return
    pytest.fail(f"not found in {MOST} schedules")


def _that_may_show(name: str) -> Iterator[int]:
    return (seed for seed in itertools.count() if may_show(name, draw(seed)))
