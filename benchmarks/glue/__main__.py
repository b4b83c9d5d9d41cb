"""`fedbert-ds glue` beside plain transformers code: the same recipe, checkpoint, data and seeds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.glue.benchmark import GlueOptions, bench_glue
from fedbert_ds.bench.commands import add_out, typed
from fedbert_ds.errors import one_line_errors

PROGRAM = "python -m benchmarks.glue"


def build_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint: folder or hub name")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="GLUE's original files")
    add_out(parser, "the record")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-glue"), metavar="DIR", help="for the runs")
    parser.add_argument("--tasks", nargs="+", default=["RTE", "STS-B", "SST-2"], metavar="TASK")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    parser.add_argument("--epochs", type=int, metavar="N", help="(default: run_glue's)")
    parser.add_argument("--learning-rate", type=float, metavar="X", help="(default: run_glue's)")
    parser.add_argument("--train-examples", type=int, metavar="N", help="train on so many, drawn once (default: all)")
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and measure."""
    bench_glue(typed(GlueOptions, build_parser().parse_args(arguments), PROGRAM))


if __name__ == "__main__":
    main()
