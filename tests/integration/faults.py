"""One long run that everything happens to, beside the same run undisturbed.

    python tests/integration/faults.py --faults 2000 --minutes 180 --processes 8 --out FILE.json
    python tests/integration/faults.py --faults 62 --minutes 30 --processes 32 --alike
        --on-loss continue --out FILE.json

Any process is killed (the coordinator, too), stopped for a while, loses its connections or sends
twice; the newest checkpoint is damaged; a rank's disk is full. Whoever ends is started again at
once: the ranks all together with --resume, as a launcher does, a client without its folder.
Processes are forked off one that has imported everything.

The run is stopped after so many minutes. The undisturbed run then trains as many windows. Goodput
is the tokens a second that the disturbed run has trained and kept over those of the other. Where
the run waits for lost clients, losses and weights must be the same bit by bit.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from integration.chaos import Outcome, outcome
from integration.cluster import run_file, write_text
from integration.faults_process import DROP, DUPLICATE
from integration.federation import Federation, fork_quickly

from fedbert_ds.errors import INTERRUPTED
from fedbert_ds.server.checkpoint_folder import CheckpointFolder
from fedbert_ds.telemetry.record import source_commit, write_record

RANKS = 2
KINDS = {"kill a client": 30, "kill a rank": 6, "stop": 20, "drop": 20, "duplicate": 16, "corrupt": 4, "full disk": 4}
"""Each kind of fault, and how often it is drawn of 100."""
OF_RANKS = {"kill a rank", "corrupt", "full disk"}
OF_CLIENTS = {"kill a client"}
ALIKE = KINDS | {"kill a rank": KINDS["kill a client"]}
"""How often each kind is drawn of those that can happen to a process, where all are alike."""
LONGEST_GAP = 15.0
"""Seconds between two faults, where there are enough of them."""
LONGEST_STOP = 3.0
"""Seconds that a process is stopped for."""
LOOK_SECONDS = 0.05
DEADLINE_SECONDS = 600.0
"""Longest time without a window, after which the run is said to hang."""


@dataclass(frozen=True)
class Fault:
    """One fault of a schedule."""

    at: float
    """Seconds after the first window."""
    kind: str
    who: str
    """A process; for what happens to files, a rank."""
    seconds: float
    """How long a process is stopped."""


def drawn(seed: int, num: int, seconds: float, clients: Sequence[str], alike: bool = False) -> list[Fault]:
    """The faults of a schedule, in order; with `alike` each process meets as many as another."""
    rng = random.Random(seed)
    ranks = [f"rank {number}" for number in range(RANKS)]
    mean = seconds / num
    faults, at = [], 0.0
    for _ in range(num):
        gap = mean * rng.uniform(0.5, 1.5)
        at += min(gap, LONGEST_GAP) if mean <= LONGEST_GAP else gap
        if alike:
            who = rng.choice([*ranks, *clients])
            impossible = OF_CLIENTS if who in ranks else OF_RANKS
            kinds = {kind: often for kind, often in ALIKE.items() if kind not in impossible}
            kind = rng.choices(list(kinds), list(kinds.values()))[0]
        else:
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            who = rng.choice(ranks if kind in OF_RANKS else list(clients) if kind in OF_CLIENTS else [*ranks, *clients])
        faults.append(Fault(at, kind, who, rng.uniform(0.3, LONGEST_STOP)))
    return faults


@dataclass
class Told:
    """What was seen of one run."""

    times: list[float] = field(default_factory=list)
    """When each further window was first there, seconds of a monotonic clock."""
    done: list[tuple[float, str]] = field(default_factory=list)
    """Faults that were dealt, and when."""
    stopped: float = 0.0
    """When the run was asked to stop."""
    starts: Counter[str] = field(default_factory=Counter)
    """How often ranks and clients were started again."""
    redone: int = 0
    """Windows that were trained again after a restart."""


class Disturbed:
    """A run, and who disturbs it."""

    def __init__(self, federation: Federation, faults: Sequence[Fault], longest: float) -> None:
        self.federation, self._faults, self._longest = federation, list(faults), longest
        self.told = Told()
        self._windows = 0
        self._stopped: list[tuple[float, int]] = []
        """When to let which process id go on."""

    def train(self) -> int:
        """Run until the faults are dealt and the time is over, or to the end; the windows at the
        stop. AssertionError, with logs, for a run that hangs or ends in another way.
        """
        federation = self.federation
        with federation:
            federation.start_ranks(RANKS)
            for client in federation.data:
                federation.start_client(client)
            is_stopping, last_progress = False, time.monotonic()
            while federation.is_running:
                time.sleep(LOOK_SECONDS)
                now = time.monotonic()
                if is_new := self._look(now):
                    last_progress = now
                assert now - last_progress < DEADLINE_SECONDS, f"no window for long\n{federation.logs()}"
                self._let_go_on(now)
                if is_stopping and self._has_failed():
                    # A fault that had not shown before: the last checkpoint met a full disk.
                    self.told.stopped, is_stopping = 0.0, False
                    self._look(now)  # windows after the stop count, too, and are not new
                    is_new = False
                if is_stopping:
                    self._end_clients()
                    continue
                self._start_again()
                if self.told.times:
                    since = now - self.told.times[0]
                    self._deal(since)
                    # While it trains: a run that waits for its clients to join has nothing to save.
                    if is_new and not self._faults and since > self._longest:
                        self._let_go_on(float("inf"))
                        self.told.stopped = now
                        self.told.times = [at for at in self.told.times if at <= now]
                        federation.stop_ranks()
                        is_stopping = True
        return self._windows

    def _look(self, now: float) -> bool:
        """Count windows; True for a new one."""
        path = self.federation.run_folder / "metrics.jsonl"
        count = path.read_bytes().count(b"\n") if path.is_file() else 0
        if count < self._windows and count:
            self.told.redone += self._windows - count
        self._windows = count or self._windows
        new = count - len(self.told.times)
        if not self.told.stopped:
            self.told.times += [now] * new
        return new > 0

    def _start_again(self) -> None:
        federation = self.federation
        for name, code in federation.failures().items():
            if name.startswith("rank"):
                self.told.starts["ranks"] += 1
                self._stopped = [(at, pid) for at, pid in self._stopped if pid not in self._pids("rank")]
                federation.start_ranks(RANKS, resume=True)
                return
            self.told.starts["clients"] += 1
            del code
            shutil.rmtree(federation.state(name), ignore_errors=True)
            federation.start_client(name)

    def _has_failed(self) -> bool:
        """A rank has ended in another way than one that was asked to stop."""
        failures = self.federation.failures()
        return any(name.startswith("rank") and code != INTERRUPTED for name, code in failures.items())

    def _end_clients(self) -> None:
        """Clients of a run that was stopped wait for it to go on: nobody resumes this one."""
        if not any(process.is_alive() for name, process in self.federation.processes.items() if name[:4] == "rank"):
            self.federation.kill(*[name for name in self.federation.processes if name[:4] != "rank"])

    # -- faults ------------------------------------------------------------------------------------

    def _deal(self, since: float) -> None:
        while self._faults and self._faults[0].at <= since:
            fault = self._faults.pop(0)
            if self._happens(fault):
                self.told.done.append((time.monotonic(), fault.kind))

    def _happens(self, fault: Fault) -> bool:
        process = self.federation.processes.get(fault.who)
        try:
            if process is not None and process.is_alive():
                self._befall(process, fault)
                return True
        except ProcessLookupError:
            pass  # it has just ended
        self._faults.append(replace(fault, at=self._faults[-1].at + 1.0 if self._faults else fault.at + 1.0))
        return False

    def _befall(self, process: BaseProcess, fault: Fault) -> None:
        pid = process.pid
        assert pid is not None
        match fault.kind:
            case "kill a client" | "kill a rank":
                process.kill()
                process.join(10)
            case "stop":
                os.kill(pid, signal.SIGSTOP)
                self._stopped.append((time.monotonic() + fault.seconds, pid))
            case "drop":
                # A rank's connections are those of all its clients.
                names = [fault.who] if fault.who in self.federation.data else list(self.federation.data)
                for name in names:
                    self._signal(name, DROP)
            case "duplicate":
                self._signal(fault.who, DUPLICATE)
            case "corrupt":
                self._corrupt()
                process.kill()
                process.join(10)
            case "full disk":
                # Every write of the rank beyond this size fails, as on a disk that is full.
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    def _signal(self, name: str, number: int) -> None:
        process = self.federation.processes.get(name)
        if process is not None and process.is_alive() and process.pid is not None:
            os.kill(process.pid, number)

    def _corrupt(self) -> None:
        """One bit of the newest of several checkpoints."""
        folder = CheckpointFolder(self.federation.run_folder / "checkpoints")
        windows = sorted(folder.complete_windows())
        if len(windows) > 1:
            path = max(folder.of(windows[-1]).iterdir(), key=lambda one: one.stat().st_size)
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)

    def _let_go_on(self, now: float) -> None:
        for at, pid in self._stopped:
            if at <= now:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        self._stopped = [(at, pid) for at, pid in self._stopped if at > now]

    def _pids(self, kind: str) -> set[int | None]:
        return {process.pid for name, process in self.federation.processes.items() if name.startswith(kind)}


@dataclass
class Result:
    """A disturbed run beside the undisturbed one."""

    windows: int
    is_identical: bool | None
    """None for a run that goes on without who is gone: no other has lost the same tokens."""
    seconds: float
    """Of the disturbed run, from its first window until it was asked to stop."""
    undisturbed_seconds: float
    """Of the undisturbed run, for the windows that were trained in that time."""
    tokens: int
    undisturbed_tokens: int
    """Trained in these windows."""
    lost_masked_tokens: int
    """Left out, for their client was late or gone."""
    told: Told

    @property
    def goodput(self) -> float:
        """Committed work over the work of the undisturbed run in the same time."""
        return self.tokens / self.seconds / (self.undisturbed_tokens / self.undisturbed_seconds)

    def lost_seconds(self) -> dict[str, tuple[int, float]]:
        """(how many, seconds they cost) by kind: what windows took beyond the median, charged to
        the first fault inside, or else to the last one before.
        """
        times = [*self.told.times, self.told.stopped]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        usual = statistics.median(gaps) if gaps else 0.0
        costs: dict[str, float] = defaultdict(float)
        done = list(self.told.done)
        kind = "none yet"
        for gap, end in zip(gaps, times[1:], strict=True):
            inside = [what for at, what in done if at <= end]
            done = done[len(inside) :]
            kind = inside[0] if inside else kind
            costs[kind] += gap - usual
        counts = Counter(kind for _, kind in self.told.done)
        # A kind that was never the first inside a gap has cost nothing, and has happened.
        return {kind: (counts[kind], costs.get(kind, 0.0)) for kind in dict.fromkeys([*costs, *counts])}


def compared(
    folder: Path,
    seed: int,
    num_faults: int,
    seconds: float,
    processes: int,
    save_every: int,
    on_loss: str = "wait",
    alike: bool = False,
) -> Result:
    """Both runs, one after the other. AssertionError where one does not come to its end."""
    clients = {f"client-{number:02}": 2 + number % 3 for number in range(processes - RANKS)}
    faults = drawn(seed, num_faults, seconds, sorted(clients), alike)
    disturbed = Disturbed(_federation(folder / "disturbed", clients, 10**6, save_every, on_loss), faults, seconds)
    disturbed.train()
    rows = disturbed.federation.metrics()
    windows, last = len(rows), len(disturbed.told.times) - 1
    told = disturbed.told
    whole = Disturbed(_federation(folder / "undisturbed", clients, windows, save_every, on_loss), [], float("inf"))
    whole.train()
    return Result(
        windows=windows,
        is_identical=_outcome(disturbed, windows) == _outcome(whole, windows) if on_loss == "wait" else None,
        seconds=told.stopped - told.times[0],
        undisturbed_seconds=whole.told.times[last] - whole.told.times[0],
        tokens=sum(row["tokens"] for row in rows[1 : last + 1]),
        undisturbed_tokens=sum(row["tokens"] for row in whole.federation.metrics()[1 : last + 1]),
        lost_masked_tokens=sum(row["lost_masked_tokens"] for row in rows),
        told=told,
    )


def _outcome(run: Disturbed, windows: int) -> Outcome:
    return outcome(run.federation.run_folder, windows)


def _federation(folder: Path, clients: dict[str, int], windows: int, save_every: int, on_loss: str) -> Federation:
    folder.mkdir()
    data = write_text(folder, clients)
    tree: dict[str, Any] = run_file(
        folder,
        "run",
        run={"windows": windows, "save_every": save_every},
        model={"num_hidden_layers": 2, "dropout": 0.1},
        window={"order": "fixed" if on_loss == "wait" else "arrival", "tokens": 100 * len(clients)},
        optimizer={"schedule": "constant", "lr": 0.003, "warmup_windows": 0},
        clients={"on_loss": on_loss, "expected": len(clients), "join_timeout": 600},
    )
    return Federation(folder, tree, data)


def write(path: Path, result: Result, command: str, commit: str | None, **more: Any) -> dict[str, Any]:
    """Write a record, and return it: a row for each kind of fault."""
    told = result.told
    return write_record(
        path, command=command, commit=commit, **more, faults=len(told.done), windows=result.windows,
        is_identical=result.is_identical, seconds=result.seconds, undisturbed_seconds=result.undisturbed_seconds,
        tokens=result.tokens, undisturbed_tokens=result.undisturbed_tokens,
        lost_masked_tokens=result.lost_masked_tokens, goodput=result.goodput, starts=dict(told.starts),
        windows_again=told.redone,
        rows=[{"kind": kind, "faults": n, "seconds": round(s, 1)} for kind, (n, s) in result.lost_seconds().items()],
    )  # fmt: skip


def page_table(record: Mapping[str, Any]) -> str:
    """A record as Markdown: what happened, how often, what was started again, and what is left."""
    lines = ["| what happened | times |", "| --- | ---: |"]
    lines += [f"| {row['kind']} | {row['faults']} |" for row in record["rows"] if row["faults"]]
    starts = record["starts"]
    lines += [f"| **faults** | **{record['faults']}** |"]
    lines += [f"| all ranks started again | {starts.get('ranks', 0)} |"]
    lines += [f"| a client started again | {starts.get('clients', 0)} |"]
    lines += [f"| windows trained again | {record['windows_again']} |"]
    lines += [f"| **goodput** | **{100 * record['goodput']:.1f} %** |"]
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20, metavar="N", help="how many")
    parser.add_argument("--minutes", type=float, default=2.0, metavar="M", help="over how long a time")
    parser.add_argument("--processes", type=int, default=8, metavar="P", help="two ranks among them")
    parser.add_argument("--save-every", type=int, default=10, metavar="W", help="windows between checkpoints")
    parser.add_argument("--alike", action="store_true", help="each process meets as many faults as another")
    parser.add_argument("--on-loss", choices=("wait", "continue"), default="wait", help="clients.on_loss of the run")
    parser.add_argument("--seed", type=int, metavar="S", help="of the schedule")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write a record")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs' folders here")
    return parser


def main() -> int:
    """Run as the command line says; returns the exit code."""
    options = build_parser().parse_args()
    seed = options.seed if options.seed is not None else random.randrange(10**6)
    print(f"seed {seed}", flush=True)
    fork_quickly()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="faults"))
    folder.mkdir(parents=True, exist_ok=True)
    commit = source_commit()
    try:
        result = compared(
            folder, seed, options.faults, 60 * options.minutes, options.processes, options.save_every, options.on_loss,
            options.alike,
        )  # fmt: skip
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    told = result.told
    print(f"{len(told.done)} faults in {result.seconds:.0f} s over {options.processes} processes")
    for kind, (count, seconds) in sorted(result.lost_seconds().items()):
        print(f"  {count:5} {kind:<14} {seconds:8.1f} s lost, {seconds / max(1, count):6.2f} s each")
    print(
        f"{told.starts['ranks']} starts of all ranks, {told.starts['clients']} of a client, {told.redone} windows again"
    )
    verdict = {True: "bit-identical", False: "DIFFERENT", None: "going on without who is gone"}[result.is_identical]
    print(f"{result.windows} windows, {verdict}, {result.lost_masked_tokens} masked tokens lost")
    print(f"goodput {100 * result.goodput:.1f} %: {result.undisturbed_seconds:.0f} s undisturbed", flush=True)
    if options.out is not None:
        command = (
            f"python tests/integration/faults.py --faults {options.faults} --minutes {options.minutes:g} "
            f"--processes {options.processes} --save-every {options.save_every} --on-loss {options.on_loss} "
            f"{'--alike ' if options.alike else ''}--seed {seed} --out {options.out}"
        )
        write(options.out, result, command, commit, on_loss=options.on_loss, processes=options.processes)
    return 1 if result.is_identical is False else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.exit(main())
