"""Held-out loss against windows with AdamW and with Muon, each at its best learning rate."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.optimizers.benchmark import OptimizersOptions, bench_optimizers
from fedbert_ds.bench.commands import add_out, typed
from fedbert_ds.errors import one_line_errors

PROGRAM = "python -m benchmarks.optimizers"


def build_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    add_out(parser, "the record")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.5e-3, 3e-3, 6e-3], help="learning rates to try")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each optimizer at its best rate")
    parser.add_argument("--every", type=int, default=10, metavar="N", help="windows between evaluations")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="section.key=value", help="for all")
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and measure."""
    bench_optimizers(typed(OptimizersOptions, build_parser().parse_args(arguments), PROGRAM))


if __name__ == "__main__":
    main()
