"""A GLUE task by one recipe: in one place, split between two, and by clients that keep labels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fine_tuning.benchmark import FineTuningOptions, bench_fine_tuning
from fedbert_ds.bench.commands import add_out, typed
from fedbert_ds.errors import one_line_errors

PROGRAM = "python -m benchmarks.fine_tuning"


def build_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint: folder or hub name")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="GLUE's original files")
    add_out(parser, "the record")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-fine-tuning"), metavar="DIR", help="for the runs")
    parser.add_argument("--task", default="SST-2", metavar="TASK", help="(default: SST-2)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="(default: 0)")
    parser.add_argument("--clients", type=int, default=4, metavar="N", help="of the federation (default: 4)")
    parser.add_argument("--modes", nargs="+", default=["synchronous"], metavar="MODE", help="(default: synchronous)")
    parser.add_argument("--epochs", type=int, metavar="N", help="(default: run_glue's)")
    parser.add_argument("--learning-rate", type=float, metavar="X", help="(default: run_glue's, 2e-5)")
    parser.add_argument("--train-examples", type=int, metavar="N", help="train on so many, drawn once (default: all)")
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and measure."""
    bench_fine_tuning(typed(FineTuningOptions, build_parser().parse_args(arguments), PROGRAM))


if __name__ == "__main__":
    main()
