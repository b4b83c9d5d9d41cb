"""The most memory a client process holds, by phase, of a text that its memory could not hold."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.large_text.benchmark import LargeTextOptions, bench_large_text
from fedbert_ds.bench.commands import add_out, typed
from fedbert_ds.errors import one_line_errors

PROGRAM = "python -m benchmarks.large_text"


def build_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    add_out(parser, "the record")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-large-text"), metavar="DIR", help="for the runs")
    parser.add_argument("--gigabytes", type=float, default=10.0, metavar="N", help="of text (10)")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="section.key=value", help="for all")
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and measure."""
    bench_large_text(typed(LargeTextOptions, build_parser().parse_args(arguments), PROGRAM))


if __name__ == "__main__":
    main()
