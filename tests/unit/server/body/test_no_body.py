"""What stands in for a body makes a checkpoint's folder, and nothing else."""

from __future__ import annotations

from pathlib import Path

from fedbert_ds.server.body.no_body import NoBody
from fedbert_ds.server.queue.in_flight import MOST_IN_FLIGHT


def test_it_steps_saves_and_merges_nothing(tmp_path: Path) -> None:
    body = NoBody()
    assert body.step(0.1) == 1.0 and body.full_state() == {}
    assert not body.lockstep_forwards and body.affordable_in_flight() == MOST_IN_FLIGHT
    for _ in range(2):  # every rank does, on one disk
        body.save(tmp_path / "checkpoints", 7)
    assert [path.name for path in (tmp_path / "checkpoints").rglob("*")] == ["window-7"]
    body.load(tmp_path / "checkpoints", 7, ranks=2, stage=0)
