"""Six short runs that no refactoring changes: losses and weights compared bit by bit.

    python tests/integration/recorded_runs.py            compare with recorded_runs.json
    python tests/integration/recorded_runs.py --write NAME ...    record these anew (all without a
    name)

The record names the commit that made each run: one that changes a number on purpose records its
runs anew. A difference is exit code 1. Bits depend on the processor and on the versions of torch
and DeepSpeed, which the record names. On another machine, record at the older commit first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_suffix(".json")


def jobs(folder: Path) -> list[dict[str, Any]]:
    """Every ZeRO stage, both modes, cut `rows`, dropout, clipping, a stop and a resume."""
    from integration.cluster import ZERO, run_file, write_text

    data = write_text(folder)
    dropout = {"dropout": 0.1}
    parallel = {"mode": "parallel", "average_every": 2}
    todo = []

    def add(name: str, stage: int, resume: bool = False, mutation: str | None = None, **sections: Any) -> None:
        tree = run_file(
            folder, name, window={"order": "fixed"}, body={"deepspeed": str(ZERO / f"zero{stage}.json")}, **sections
        )
        todo.append({"config": tree, "resume": resume, "mutation": mutation, "data": data})

    add("zero0-synchronous", 0, model=dropout)
    add("zero1-parallel-int8", 1, federation=parallel, wire={"updates": "int8", "activations": "int8"})
    add("zero2-rows-synchronous", 2, cut="rows", optimizer={"name": "lamb", "lr": 0.01, "gradient_clipping": 1.0})
    add("zero3-layers-synchronous", 3, cut={"layers": 1}, model=dropout)
    add(
        "zero2-parallel",
        2,
        model=dropout,
        federation={**parallel, "average_scope": "embeddings", "personal_parts": "averaged"},
    )
    add("zero2-resumed", 2, model=dropout, mutation="stopped before window 3")
    add("zero2-resumed", 2, model=dropout, resume=True)
    return todo


def run() -> dict[str, Any]:
    """Train all runs: losses per window as hexadecimal floats, a digest of final weights."""
    from integration.cluster import run_jobs

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        todo = jobs(folder)
        run_jobs(folder, todo)
        directories = dict.fromkeys(Path(job["config"]["run"]["directory"]) for job in todo)
        return {
            "machine": _machine(),
            "runs": {path.name: {"losses": _losses(path), "weights": _digest(path)} for path in directories},
        }


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each run that differs in any bit."""
    lines = []
    for name in sorted({*recorded["runs"], *now["runs"]}):
        before, after = (side["runs"].get(name) for side in (recorded, now))
        if before is None or after is None:
            lines.append(f"{name}: only {'recorded' if after is None else 'run now'}")
        elif before["losses"] != after["losses"]:
            pairs = zip(before["losses"], after["losses"], strict=False)
            window = next((number for number, (a, b) in enumerate(pairs) if a != b), "of the last")
            lines.append(f"{name}: losses differ from window {window} on")
        elif before["weights"] != after["weights"]:
            lines.append(f"{name}: final weights differ")
    return lines


def _losses(run_folder: Path) -> list[str]:
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [float(row["loss"]).hex() for row in rows]


def _digest(run_folder: Path) -> str:
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(run_folder / "hf" / "model.safetensors").items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _machine() -> dict[str, str]:
    import deepspeed
    import torch

    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": unknown")
    return {
        "processor": model.partition(":")[2].strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }


def main() -> int:
    """Record or compare, by the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", nargs="*", metavar="NAME", help="record these runs anew, or all")
    options = parser.parse_args()
    now = run()
    recorded = json.loads(RECORD.read_text()) if RECORD.is_file() else {"runs": {}}
    if options.write is not None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        names = options.write or list(now["runs"])
        anew = {name: {"commit": commit, **now["runs"][name]} for name in names}
        RECORD.write_text(json.dumps({"machine": now["machine"], "runs": recorded["runs"] | anew}, indent=1) + "\n")
        print(f"{RECORD}: recorded {', '.join(names)}")
        return 0
    if recorded["machine"] != now["machine"]:
        print(f"recorded on another machine: {recorded['machine']}; this is {now['machine']}")
    lines = differences(recorded, now)
    for name, row in recorded["runs"].items():
        print(f"{name}: recorded at {row['commit'][:7]}")
    print("\n".join(lines) or f"{len(now['runs'])} runs equal the recorded ones to the last bit")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
