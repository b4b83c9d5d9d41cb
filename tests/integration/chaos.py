"""Runs whose processes are killed at any moment, beside the same run undisturbed.

    python tests/integration/chaos.py --minutes 30        drawn schedules, their seeds printed
    python tests/integration/chaos.py --seed 7            one of them again
    python tests/integration/chaos.py --table             every phase, process and mode

With `clients.on_loss: wait` a disturbed run ends with the losses and weights of the undisturbed
one, bit by bit. A process dies by its own kill -9 in the phase that the schedule says. A client
comes back at once as another process, in synchronous mode on another machine: without its folder.
When a rank dies, all are started again with --resume, as a launcher does; an aggregator of another
party is started again with --resume by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from integration.chaos_process import PHASES, Kill, is_done
from integration.cluster import CLIENTS, WORLD_SIZE, aggregator_section, run_file, write_text
from integration.federation import Federation, fork_quickly

from fedbert_ds.telemetry.record import source_commit, write_record

WINDOWS = 8
SAVE_EVERY = 3
MODES: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "parallel": {"federation": {"mode": "parallel", "average_every": 2}},
    "sequential": {"federation": {"mode": "sequential", "average_every": 2}},
    "synchronous-elsewhere": {"optimizer": {"gradient_clipping": 0.05}, "aggregator": {}},
    "parallel-elsewhere": {"federation": {"mode": "parallel", "average_every": 2}, "aggregator": {}},
    "sequential-elsewhere": {"federation": {"mode": "sequential", "average_every": 2}, "aggregator": {}},
    "whole": {
        "cut": "whole",
        "federation": {"mode": "parallel", "average_every": 2, "server_optimizer": "nesterov"},
        "wire": {"updates": "int8"},
    },
}
VICTIMS = ("a client", "a rank", "all ranks")
ELSEWHERE = "the aggregator"
"""A victim in modes that have one."""
PHASES_ELSEWHERE = ("manifest", "gradient", "averaging", "commit", "checkpoint")
"""Of a window at an aggregator of another party, which sees no activations."""


@dataclass(frozen=True)
class Outcome:
    """What two runs must have in common."""

    losses: tuple[str, ...]
    """Of each window, as hexadecimal floats."""
    weights: str
    """A digest of the final ones."""


@dataclass
class Disturbed:
    """One run in which processes die. `train` starts again what dies."""

    federation: Federation
    kills: Sequence[Kill]
    is_stateless: bool
    """A client that comes back has no folder."""
    restarts: int = 0

    def train(self, timeout: float) -> Outcome:
        """Run to the end. AssertionError, with logs, if it does not come to it."""
        federation = self.federation
        with federation:
            if "aggregator" in federation.tree:
                federation.start_aggregator(kills=self.kills)
            federation.start_ranks(WORLD_SIZE, kills=self.kills)
            for client in CLIENTS:
                federation.start_client(client, kills=self.kills)
            federation.wait(lambda: not federation.is_running, timeout, self._restart_what_died)
        # A death can take away the occasion of another one: while a lost client's window is planned
        # again a rank need not wait, a client that comes back is not asked to save.
        died = any(is_done(federation.folder, kill) for kill in self.kills)
        assert died or not self.kills, f"never came to any of {self.kills}\n{federation.logs()}"
        return outcome(federation.run_folder)

    def _restart_what_died(self) -> None:
        federation = self.federation
        for name, code in federation.failures().items():
            if name.startswith("rank"):
                self.restarts += 1
                assert self.restarts <= len(self.kills), f"{name} ended with {code}\n{federation.logs()}"
                federation.start_ranks(WORLD_SIZE, resume=True, kills=self.kills)
                return
            assert code == -signal.SIGKILL, f"{name} ended with {code}\n{federation.logs()}"
            if name == "aggregator":
                federation.start_aggregator(resume=True, kills=self.kills)
                continue
            if self.is_stateless:
                shutil.rmtree(federation.state(name), ignore_errors=True)
            federation.start_client(name, kills=self.kills)


def train(
    folder: Path, name: str, mode: str, kills: Sequence[Kill], timeout: float = 240.0, evaluates: bool = False
) -> Outcome:
    """One run of `mode` with these deaths; if it `evaluates`, before every window but the first."""
    place = folder / name
    place.mkdir()
    data = write_text(place)
    tree = run_file(
        place,
        "run",
        run={"windows": WINDOWS, "save_every": SAVE_EVERY, "evaluate_every": 1 if evaluates else None},
        data={"client_held_out": 0.3 if evaluates else 0.0},
        model={"num_hidden_layers": 2, "dropout": 0.1},
        window={"order": "fixed", "tokens": 400},
        clients={"on_loss": "wait", "join_timeout": 120, "reconnect_timeout": 0.5},
        **MODES[mode],
    )  # fmt: skip
    if "aggregator" in tree:
        tree["aggregator"] = aggregator_section(place)
    return Disturbed(Federation(place, tree, data), kills, mode.startswith("synchronous")).train(timeout)


def outcome(run_folder: Path, windows: int = WINDOWS) -> Outcome:
    """Losses and weights of a finished run."""
    from safetensors.torch import load_file

    from fedbert_ds.model.halves import CLIENT_MODEL, merge_folders

    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["window"] for row in rows] == list(range(windows)), [row["window"] for row in rows]
    assert not any(row["lost_masked_tokens"] for row in rows), "tokens were lost"
    model, elsewhere = run_folder / "hf", run_folder.with_name(f"{run_folder.name}-aggregator")
    if elsewhere.exists():
        merge_folders(run_folder / "body", elsewhere / CLIENT_MODEL, model)
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(model / "model.safetensors").items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return Outcome(tuple(float(row["loss"]).hex() for row in rows), digest.hexdigest())


def kills_of(victim: str, phase: str, window: int, mode: str, rng: random.Random) -> list[Kill]:
    """The deaths of one disturbance, in `window` or the next one that has the phase."""
    if phase == "checkpoint":
        window = SAVE_EVERY
    elif phase == "averaging" or (phase == "commit" and victim == "a client") or victim == ELSEWHERE:
        window |= 1  # halves are averaged after odd windows
    if victim == "a client":
        names = sorted(CLIENTS)
        has_its_turn = names[window // 2 % len(names)]
        return [Kill(has_its_turn if mode.startswith("sequential") else rng.choice(names), phase, window)]
    if victim == ELSEWHERE:
        return [Kill("aggregator", phase, window)]
    if victim == "a rank":
        return [Kill("rank 1", phase, window)]
    return [Kill(f"rank {rank}", phase, window) for rank in range(WORLD_SIZE)]


def schedule(seed: int) -> tuple[str, list[Kill]]:
    """A mode and the deaths of a run, drawn."""
    rng = random.Random(seed)
    mode = rng.choice(sorted(MODES))
    kills: list[Kill] = []
    for _ in range(rng.randint(1, 3)):
        victim = rng.choice([*VICTIMS[:2], *[ELSEWHERE] * ("aggregator" in MODES[mode])])
        window = rng.randint(1, WINDOWS - 2)
        phase = rng.choice(PHASES_ELSEWHERE if victim == ELSEWHERE else PHASES)
        kills += kills_of(victim, phase, window, mode, rng)
    return mode, sorted(set(kills))


def build_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, metavar="M", help="how long to draw schedules")
    parser.add_argument("--seed", type=int, metavar="N", help="one schedule")
    parser.add_argument("--first-seed", type=int, metavar="N", help="the first of the schedules drawn")
    parser.add_argument("--table", action="store_true", help="every phase, kind of process and mode once")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of the table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table as a record")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs' folders here")
    return parser


def main() -> int:
    """Run as the command line says; returns the exit code."""
    options = build_parser().parse_args()
    fork_quickly()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="chaos"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if options.table:
            return _table(folder, options.modes, options.out)
        first = options.seed if options.seed is not None else options.first_seed
        return _drawn(folder, options.minutes, first if first is not None else random.randrange(10**6), options.seed)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _drawn(folder: Path, minutes: float, first_seed: int, only: int | None) -> int:
    undisturbed: dict[str, Outcome] = {}
    started, seed, failures = time.monotonic(), first_seed, 0
    while time.monotonic() - started < 60 * minutes and (only is None or seed == only):
        mode, kills = schedule(seed)
        if mode not in undisturbed:
            undisturbed[mode] = train(folder, f"{mode}, undisturbed", mode, [])
        failures += not _is_same(folder, f"seed {seed}", mode, kills, undisturbed[mode])
        seed += 1
    print(f"{seed - first_seed} schedules, {failures} failed", flush=True)
    return 1 if failures else 0


def _table(folder: Path, modes: Sequence[str], out: Path | None) -> int:
    rng, rows = random.Random(0), []
    commit = source_commit()
    print(f"{'mode':<24} {'killed':<15} " + " ".join(f"{phase:<12}" for phase in PHASES), flush=True)
    for mode in modes:
        undisturbed = train(folder, f"{mode}, undisturbed", mode, [])
        for victim in ("a client", ELSEWHERE) if "aggregator" in MODES[mode] else VICTIMS:
            cells = dict.fromkeys(PHASES, "-")
            for phase in PHASES_ELSEWHERE if victim == ELSEWHERE else PHASES:
                kills = kills_of(victim, phase, 4, mode, rng)
                same = _is_same(folder, f"{mode}, {victim}, {phase}", mode, kills, undisturbed)
                cells[phase] = "identical" if same else "DIFFERENT"
            rows.append({"mode": mode, "killed": victim, **cells})
            print(f"{mode:<24} {victim:<15} " + " ".join(f"{cell:<12}" for cell in cells.values()), flush=True)
            if out is not None:
                command = f"python tests/integration/chaos.py --table --out {out}"
                write_record(out, command=command, commit=commit, rows=rows, windows=WINDOWS, save_every=SAVE_EVERY)
    results = [cell for row in rows for cell in row.values()]
    print(f"{results.count('identical')} identical, {results.count('DIFFERENT')} different", flush=True)
    return 1 if "DIFFERENT" in results else 0


def page_table(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows of a record as a table in Markdown: = for a run that ended identically."""
    heads = ["mode", "killed", *PHASES]
    signs = {"identical": "=", "DIFFERENT": "≠"}
    lines = [[signs.get(row[head], row[head]) for head in heads] for row in rows]
    rules = ["---"] * 2 + [":-:"] * len(PHASES)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, rules, *lines])


def _is_same(folder: Path, name: str, mode: str, kills: Sequence[Kill], undisturbed: Outcome) -> bool:
    started = time.monotonic()
    told = "; ".join(f"{kill.who} in {kill.phase} of window {kill.window}" for kill in kills)
    try:
        same = train(folder, name, mode, kills) == undisturbed
        result = "identical" if same else "DIFFERENT"
    except AssertionError as error:
        same, result = False, f"FAILED\n{error}"
    print(f"  {name}, {mode}: {told}: {result}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return same


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.exit(main())
