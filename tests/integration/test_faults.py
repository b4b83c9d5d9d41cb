"""A dozen faults of every kind in one run; faults.py deals thousands."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from integration import faults
from integration.faults import KINDS, LONGEST_GAP, OF_RANKS, compared, drawn
from integration.federation import fork_quickly

pytestmark = pytest.mark.timeout(1200)
fork_quickly()


def test_a_run_that_everything_happens_to_ends_as_if_nothing_had(tmp_path: Path) -> None:
    """A failure names its seed: python tests/integration/faults.py --faults 12 --seed SEED."""
    seed = random.randrange(10**6)
    result = compared(tmp_path, seed, num_faults=12, seconds=30.0, processes=5, save_every=5)
    assert len(result.told.done) == 12 and result.is_identical, seed


def test_a_run_that_goes_on_without_who_is_gone_comes_to_its_end(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    result = compared(tmp_path, seed, 8, seconds=20.0, processes=6, save_every=5, on_loss="continue", alike=True)
    assert len(result.told.done) == 8 and 0 < result.tokens <= result.undisturbed_tokens, seed
    told = faults.write(tmp_path / "record.json", result, "a command", None, on_loss="continue")
    assert json.loads((tmp_path / "record.json").read_text()) == json.loads(json.dumps(told))
    assert sum(row["faults"] for row in told["rows"]) == 8 and "| **faults** | **8** |" in faults.page_table(told)


def test_goodput_is_what_was_kept_a_second_over_the_undisturbed_run() -> None:
    told = faults.Told()
    assert faults.Result(5, None, 100.0, 80.0, 900, 1000, 0, told).goodput == pytest.approx(0.72)
    assert faults.Result(5, True, 100.0, 98.0, 1000, 1000, 0, told).goodput == pytest.approx(0.98)


def test_every_fault_is_counted_and_a_gap_is_charged_to_the_first_inside() -> None:
    done = [(12.0, "kill a client"), (13.0, "corrupt a file"), (14.0, "kill a client")]
    told = faults.Told(times=[0.0, 10.0, 20.0], done=done, stopped=60.0)
    lost = faults.Result(3, None, 60.0, 30.0, 300, 300, 0, told).lost_seconds()
    assert lost == {"none yet": (0, 0.0), "kill a client": (2, 30.0), "corrupt a file": (1, 0.0)}


def test_a_disk_that_is_full_when_the_run_is_stopped_is_not_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint is the first thing that the rank writes then."""
    monkeypatch.setattr(faults, "drawn", lambda *_: [faults.Fault(1.0, "full disk", "rank 1", 0.0)])
    result = compared(tmp_path, 0, num_faults=1, seconds=1.0, processes=4, save_every=10**6)
    assert result.is_identical and [kind for _, kind in result.told.done] == ["full disk"]
    assert result.told.starts["ranks"] == 1


def test_a_schedule_is_its_seed_s_and_has_no_long_pause() -> None:
    clients = [f"client-{number}" for number in range(6)]
    schedule = drawn(7, 2000, 2000 * 12.0, clients)
    assert schedule == drawn(7, 2000, 2000 * 12.0, clients) != drawn(8, 2000, 2000 * 12.0, clients)
    assert {fault.kind for fault in schedule} == KINDS.keys()
    assert {fault.who for fault in schedule} == {"rank 0", "rank 1", *clients}
    for fault in drawn(7, 2000, 2000 * 12.0, clients, alike=True):
        assert fault.who in clients or fault.kind != "kill a client"
        assert fault.who not in clients or fault.kind not in OF_RANKS
    whom = Counter(fault.who for fault in drawn(7, 8000, 8000 * 12.0, clients, alike=True))
    assert len(whom) == 8 and max(whom.values()) < 1.2 * min(whom.values())
    gaps = [later.at - earlier.at for earlier, later in itertools.pairwise(schedule)]
    # Gaps of sums of many numbers are rounded.
    assert min(gaps) > 0 and max(gaps) <= LONGEST_GAP + 1e-6
