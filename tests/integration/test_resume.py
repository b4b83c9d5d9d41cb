"""Runs that are resumed as they were not left: without a checkpoint, longer, on other ranks.

Real programs, as in chaos.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.chaos import MODES, train
from integration.chaos_process import Kill
from integration.federation import fork_quickly

pytestmark = pytest.mark.timeout(900)
fork_quickly()


@pytest.mark.parametrize("mode", MODES)
def test_ranks_that_die_before_the_first_checkpoint_begin_again(tmp_path: Path, mode: str) -> None:
    whole = train(tmp_path, "whole", mode, [])
    assert train(tmp_path, "killed", mode, [Kill("rank 1", "gradient", 1)]) == whole
