"""The most memory a client process holds, by phase of a run, in every mode."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.memory.benchmark import MemoryOptions, bench_memory
from benchmarks.memory.runs import MODELS
from fedbert_ds.bench.commands import add_out, typed
from fedbert_ds.errors import one_line_errors

PROGRAM = "python -m benchmarks.memory"


def build_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    add_out(parser, "the record")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-memory"), metavar="DIR", help="for the runs")
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=[], help="models")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="section.key=value", help="for all")
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and measure."""
    bench_memory(typed(MemoryOptions, build_parser().parse_args(arguments), PROGRAM))


if __name__ == "__main__":
    main()
