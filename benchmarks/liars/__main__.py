"""Final held-out loss with 0, 1 and 3 liars of ten clients, by how updates are combined."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.liars.benchmark import LiarsOptions, bench_liars
from benchmarks.liars.lies import LIES
from benchmarks.liars.runs import COMBINE, MODES
from fedbert_ds.bench.commands import add_out, typed
from fedbert_ds.errors import one_line_errors

PROGRAM = "python -m benchmarks.liars"


def build_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    add_out(parser, "the record")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-liars"), metavar="DIR", help="for the runs")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=["whole", "synchronous"], help="of the runs")
    parser.add_argument("--combine", nargs="+", choices=list(COMBINE), default=list(COMBINE), help="how")
    parser.add_argument("--lies", nargs="+", choices=list(LIES), default=["flip"], help="what liars do to numbers")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="section.key=value", help="for all")
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and measure."""
    bench_liars(typed(LiarsOptions, build_parser().parse_args(arguments), PROGRAM))


if __name__ == "__main__":
    main()
