"""Simulated schedules of ranks, clients and faults, each drawn from its seed and checked exactly.

    python tests/simulation/schedules.py --schedules 1000000 --workers 2     draw as many; a count
    python tests/simulation/schedules.py --first-seed 1 --minutes 60 --out FILE.json  what fits
    python tests/simulation/schedules.py --seed 7                            one of them again

The real queue, membership, cursors, window loop, aggregator and conversations run in virtual time
with whole numbers in place of tensors, in the manner of FoundationDB's tests (Zhou et al. 2021,
section 4). A run that waits for lost clients must end with every sum of the undisturbed run.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import random
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from simulation.draw import draw
from simulation.expected import check
from simulation.play import Play, simulated

from fedbert_ds.telemetry.record import source_commit, write_record

CHUNK = 200
"""Schedules that a worker plays before it tells of them."""


@dataclass
class Counts:
    """What became of many schedules."""

    schedules: int = 0
    events: int = 0
    roll_backs: int = 0
    restarts: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)
    """By seed: what was wrong."""

    def add(self, other: Counts) -> None:
        """Those of other schedules, too."""
        self.schedules += other.schedules
        self.events += other.events
        self.roll_backs += other.roll_backs
        self.restarts += other.restarts
        self.faults += other.faults
        self.failures |= other.failures


def played(seeds: range) -> Counts:
    """Play these schedules; failures are counted, not raised. Call it inside `simulated`."""
    counts = Counts()
    for seed in seeds:
        schedule = draw(seed)
        play = Play(schedule)
        try:
            play.run()
            check(play)
        except Exception as error:
            counts.failures[seed] = f"{type(error).__name__}: {error}"
        counts.schedules += 1
        counts.events += play.world.num_events
        counts.roll_backs += play.num_roll_backs
        counts.restarts += play.num_starts - 1
        counts.faults.update(fault.kind for fault in schedule.faults)
    return counts


def build_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=2000, metavar="N", help="how many to draw at most")
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="M", help="begin none after that")
    parser.add_argument("--first-seed", type=int, metavar="S", help="the first of their seeds")
    parser.add_argument("--seed", type=int, metavar="S", help="one schedule, told in full")
    parser.add_argument("--workers", type=int, default=1, metavar="W", help="processes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a record of counts, which gets one more row")
    return parser


def main() -> int:
    """Run as the command line says; returns the exit code."""
    options = build_parser().parse_args()
    if options.seed is not None:
        return _one(options.seed)
    first = options.first_seed if options.first_seed is not None else random.randrange(10**9)
    rows = _rows_of(options.out, first)
    commit, started = source_commit(), time.monotonic()
    print(f"seeds from {first} on", flush=True)
    chunks = [
        (range(start, min(start + CHUNK, first + options.schedules)), started + 60 * options.minutes)
        for start in range(first, first + options.schedules, CHUNK)
    ]
    total = Counts()
    with multiprocessing.get_context("fork").Pool(options.workers, _quickly) as workers:
        for counts in workers.imap_unordered(_chunk, chunks):
            total.add(counts)
            for seed, what in counts.failures.items():
                print(f"seed {seed}: {what}", flush=True)
            if counts.schedules and total.schedules % (50 * CHUNK) == 0:
                print(f"  {total.schedules:,} schedules, {len(total.failures)} failed", file=sys.stderr, flush=True)
    seconds = time.monotonic() - started
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in total.faults.most_common())
    print(f"{total.schedules:,} schedules in {seconds:,.0f} s ({total.schedules / seconds:,.0f} a second): {kinds}")
    print(f"{total.roll_backs:,} roll-backs, {total.restarts:,} restarts, {len(total.failures)} failed", flush=True)
    if options.out is not None and total.schedules:
        rows.append(_row(first, total, seconds, commit))
        command = f"python tests/simulation/schedules.py --first-seed {first} --schedules {total.schedules}"
        command += f" --workers {options.workers} --out {options.out}"
        write_record(options.out, command=command, commit=commit, rows=rows)
    return 1 if total.failures else 0


def _rows_of(path: Path | None, first: int) -> list[dict[str, Any]]:
    """The rows of earlier schedules in a record, which these must not repeat."""
    if path is None or not path.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    if any(first < row["first_seed"] + row["schedules"] for row in rows):
        sys.exit(f"--first-seed {first}: {path} has it; take one behind them, or another --out")
    return rows


def _row(first: int, counts: Counts, seconds: float, commit: str | None) -> dict[str, Any]:
    return {
        "first_seed": first,
        "schedules": counts.schedules,
        "seconds": round(seconds),
        "events": counts.events,
        "roll_backs": counts.roll_backs,
        "restarts": counts.restarts,
        "faults": dict(counts.faults),
        "failures": {str(seed): what for seed, what in counts.failures.items()},
        "commit": commit,
    }


def _quickly() -> None:
    torch.set_num_threads(1)
    # A schedule leaves little garbage, and looking for it takes as long as playing.
    gc.freeze()
    gc.disable()


def _chunk(work: tuple[range, float]) -> Counts:
    """Chunks begin in order, so those that were played are the first seeds."""
    seeds, deadline = work
    if time.monotonic() > deadline:
        return Counts()
    gc.collect()
    with simulated():
        return played(seeds)


def _one(seed: int) -> int:
    schedule = draw(seed)
    print(schedule, flush=True)
    play = Play(schedule)
    with simulated():
        try:
            play.run()
            check(play)
        except Exception:
            traceback.print_exc()
            print("\n".join(play.told), flush=True)
            return 1
    print(f"as it must be: {play.world.num_events} events, {play.world.now:.0f} s, {play.num_roll_backs} roll-backs")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
