"""What fp8 matrix products of the body cost in loss, beside bf16 and fp32; needs torchao."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.fp8.benchmark import Fp8Options, bench_fp8
from fedbert_ds.bench.commands import add_out, typed
from fedbert_ds.errors import one_line_errors

PROGRAM = "python -m benchmarks.fp8"


def build_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    add_out(parser, "the record")
    parser.add_argument("--data", default="python-docs", help="text, as data.source of the run file")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="section.key=value", help="for all")
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    bench_fp8(typed(Fp8Options, build_parser().parse_args(arguments), PROGRAM))


if __name__ == "__main__":
    main()
