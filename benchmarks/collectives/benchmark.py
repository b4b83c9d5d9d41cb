"""`python -m benchmarks.collectives`: collectives and optimizer calls of a window of two ranks.

The tests' own worker counts, so that record and test say the same: two gloo ranks on one machine, a
small body in bf16, a window of two micro-batches a rank.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbert_ds.errors import RunError
from fedbert_ds.telemetry.record import source_commit, write_record
from fedbert_ds.telemetry.tables import markdown

WORKER = Path(__file__).parents[2] / "tests" / "unit" / "server" / "body" / "step_worker.py"


@dataclass(frozen=True)
class CollectivesOptions:
    """What a user gives the benchmark."""

    out: Path
    """The record."""
    command: str
    """What the user typed, for the record."""
    quick: bool = False
    """Changes nothing: it takes a minute or two in any case."""


def bench_collectives(options: CollectivesOptions) -> None:
    """Count, write the record, print the table. RunError if the ranks fail."""
    commit = source_commit()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(WORKER), folder, "counts"]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        if done.returncode:
            raise RunError(f"the ranks failed: {done.stderr.strip().splitlines()[-1:]}")
        rows = rows_of(json.loads((Path(folder) / "counts-0.json").read_text(encoding="utf-8")))
    write_record(options.out, command=options.command, commit=commit, rows=rows)
    print(f"{table(rows)}\n\nrecord  {options.out}", flush=True)


def rows_of(counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row of each "stage-optimizer-layers" that rank 0 has counted."""
    rows = []
    for name, told in counts.items():
        stage, optimizer, layers = name.split("-")
        rows.append(
            {
                "stage": int(stage),
                "optimizer": optimizer,
                "layers": int(layers),
                "collectives_before_step": len(told["before"]),
                "collectives_of_step": len(told["step"]),
                "bytes": sum(size for part in ("before", "step") for _, size in told[part]),
                "gradient_bytes": told["bytes"],
                "optimizer_calls": len(told["operations"]),
                "operations_in_calls": sum(told["operations"]),
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    heads = ["ZeRO stage", "optimizer", "layers", "collectives of forwards and backwards", "of the step"]
    heads += ["their bytes, of the gradient's", "optimizer calls", "operations in them"]
    cells = [
        [
            str(row["stage"]),
            row["optimizer"],
            str(row["layers"]),
            str(row["collectives_before_step"]),
            str(row["collectives_of_step"]),
            f"{row['bytes'] / row['gradient_bytes']:.1f}",
            str(row["optimizer_calls"]),
            str(row["operations_in_calls"]),
        ]
        for row in rows
    ]
    return markdown(heads, cells, words=2)
