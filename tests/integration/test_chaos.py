"""Two minutes of drawn schedules in which processes are killed; `make chaos` does it for longer."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from integration.chaos import Outcome, schedule, train
from integration.federation import fork_quickly

pytestmark = pytest.mark.timeout(1200)
fork_quickly()

MINUTES = 2.0
FEWEST = 2
"""Schedules, however slow the machine is."""


def test_a_run_whose_processes_die_ends_as_if_they_had_not(tmp_path: Path) -> None:
    """A failure names its seed: python tests/integration/chaos.py --seed SEED."""
    started, seed, done = time.monotonic(), random.randrange(10**6), 0
    undisturbed: dict[str, Outcome] = {}
    while done < FEWEST or time.monotonic() - started < 60 * MINUTES:
        mode, kills = schedule(seed)
        if mode not in undisturbed:
            undisturbed[mode] = train(tmp_path, f"{mode}, undisturbed", mode, [])
        assert train(tmp_path, f"seed {seed}", mode, kills) == undisturbed[mode], (seed, mode, kills)
        seed, done = seed + 1, done + 1
