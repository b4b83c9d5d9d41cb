"""Count collectives, their bytes and the optimizer's calls of a window, at every ZeRO stage."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.collectives.benchmark import CollectivesOptions, bench_collectives
from fedbert_ds.bench.commands import add_out, typed
from fedbert_ds.errors import one_line_errors

PROGRAM = "python -m benchmarks.collectives"


def build_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    add_out(parser, "the record")
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and count."""
    bench_collectives(typed(CollectivesOptions, build_parser().parse_args(arguments), PROGRAM))


if __name__ == "__main__":
    main()
