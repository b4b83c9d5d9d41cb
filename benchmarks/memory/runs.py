"""One case of the memory benchmark: a run with one client, to its end, then resumed for more."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbert_ds.bench.process import LONGEST_SECONDS, running, tell
from fedbert_ds.errors import RunError
from fedbert_ds.server.run_folder import RunFolder

RUN_FILE = Path(__file__).with_name("run.yaml")
START_SECONDS = 240.0
BASE, FACTORIZED = "BERT-base", "embedding 128"
MODELS: dict[str, tuple[str, ...]] = {
    BASE: (),
    # The client half does not depend on the width of the layers.
    FACTORIZED: ("model.architecture=electra", "model.embedding_size=128"),
}
QUICK = ("tokenizer.vocab_size=1000", "data.max_articles=24", "window.tokens=1024", "window.tokens_per_micro_batch=512")


@dataclass(frozen=True)
class Case:
    """What one row and its resumed twin are measured with."""

    model: str
    mode: str
    updates: str
    """Codec of client updates."""

    @property
    def slug(self) -> str:
        """A folder name."""
        return "-".join([self.model.replace(" ", "-"), self.mode, self.updates])

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of the run file."""
        return (*MODELS[self.model], f"federation.mode={self.mode}", f"wire.updates={self.updates}")


CASES = tuple(
    Case(model, mode, updates)
    for model in MODELS
    for mode in ("synchronous", "parallel")
    for updates in ("fp32", "int8")
)


def measure(
    case: Case, work: Path, shard: Path, overrides: tuple[str, ...], longest_seconds: float = LONGEST_SECONDS
) -> list[dict[str, Any]]:
    """Two rows: of a client that takes part from the start, and of one in the resumed run.

    Peaks are in MB (1e6 bytes). RunError names the log of what failed or took longer.
    """
    folder = work / case.slug
    state = work / f"{case.slug}.state"
    for old in (folder, state):
        shutil.rmtree(old, ignore_errors=True)
    rows = []
    for begins in ("fresh", "resumed"):
        log, out = work / f"{case.slug}.{begins}.log", work / f"{case.slug}.{begins}.json"
        command = [sys.executable, "-m", "fedbert_ds.server.pretrain", "--config", str(RUN_FILE), *overrides]
        command += [*case.overrides, f"run.directory={folder}"]
        if begins == "resumed":
            command += ["run.windows=3", "--resume"]
        begun = time.monotonic()
        _run(command, folder, shard, state, log, out, longest_seconds)
        peaks = json.loads(out.read_text(encoding="utf-8"))
        phases = {name: round(peak / 1e6, 1) for name, peak in peaks.items()}
        rows.append(
            {
                "model": case.model,
                "mode": case.mode,
                "updates": case.updates,
                "begins": begins,
                "peak_mb": max(phases.values()),
                "phases": phases,
                "seconds": round(time.monotonic() - begun),
            }
        )
    return rows


def _run(
    server_command: list[str], folder: Path, shard: Path, state: Path, log: Path, out: Path, longest_seconds: float
) -> None:
    RunFolder(folder).address.unlink(missing_ok=True)
    client_log = log.with_suffix(".client.log")
    client_command = [sys.executable, "-m", "benchmarks.memory.client", "--server", "-", "--data", str(shard)]
    client_command += ["--state", str(state), "--out", str(out)]
    with running(server_command, log, "cpu") as server, running(client_command, client_log, "cpu") as client:
        tell(client, _address(folder, server, log))
        deadline = time.monotonic() + longest_seconds
        while server.poll() is None or client.poll() is None:
            if client.poll() not in (None, 0):
                raise RunError(f"the client failed (see {client_log})")
            if server.poll() not in (None, 0):
                raise RunError(f"the server failed (see {log})")
            if time.monotonic() > deadline:
                raise RunError(f"a run took more than {longest_seconds / 60:.0f} minutes (see {log})")
            time.sleep(0.1)


def _address(folder: Path, server: subprocess.Popen[str], log: Path) -> str:
    path, deadline = RunFolder(folder).address, time.monotonic() + START_SECONDS
    while not path.is_file():
        if server.poll() is not None or time.monotonic() > deadline:
            raise RunError(f"the server did not start (see {log})")
        time.sleep(0.05)
    return path.read_text().strip()
