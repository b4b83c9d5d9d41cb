"""A slice of malformed and lying messages beside an honest run; lies.py sends a million."""

from __future__ import annotations

import random

import pytest
from integration.lies import LIES, MALFORMED, play

pytestmark = pytest.mark.timeout(600)


def test_nothing_that_others_send_changes_a_bit_of_an_honest_run() -> None:
    """A failure names the seed of its run: python tests/integration/lies.py --seed SEED."""
    seed = random.randrange(10**9)
    counts = play(seed, num_malformed=600, num_lies=400)
    assert counts.different == [], f"--seed {seed}"
    assert counts.total(MALFORMED) == 600 and counts.total(LIES) >= 400
    assert all(counts.refused[kind] for kind in ("manifest", "activations", "gradient", "update", "saved"))
