"""Federated modes and centralized training on the same text, side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.modes.benchmark import bench_modes
from benchmarks.modes.systems import ModesOptions
from fedbert_ds.bench.commands import add_out, typed
from fedbert_ds.errors import one_line_errors

PROGRAM = "python -m benchmarks.modes"


def build_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--data", required=True, metavar="FILE.tokens", help="articles: WikiText, or as for eval")
    add_out(parser, "the record; a .png lies beside it")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-modes"), metavar="DIR", help="for the runs")
    parser.add_argument("--windows", type=int, metavar="N", help="windows of each run (default: the run file's)")
    parser.add_argument("--staleness", action="store_true", help="exact windows beside bounded staleness instead")
    parser.add_argument("--whole", action="store_true", help="clients that hold the whole model or take turns instead")
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[], metavar="LR", help="try these, for each system its best"
    )
    parser.add_argument("--tuning-windows", type=int, metavar="N", help="windows of each try (default: as compared)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change configs/wikitext.yaml")
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and measure."""
    options = build_parser().parse_args(arguments)
    windows = [] if options.windows is None else [f"run.windows={options.windows}"]
    bench_modes(typed(ModesOptions, options, PROGRAM, overrides=(*windows, *options.overrides)))


if __name__ == "__main__":
    main()
