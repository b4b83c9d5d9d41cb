"""Seconds of a masked-LM evaluation by how its text is batched: by tokens, by count, not padded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.evaluation.benchmark import EvaluationOptions, bench_evaluation
from fedbert_ds.bench.commands import add_out, typed
from fedbert_ds.errors import one_line_errors

PROGRAM = "python -m benchmarks.evaluation"


def build_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    add_out(parser, "the record")
    parser.add_argument("--data", default="python-docs", help="text, as data.source of the run file")
    parser.add_argument("--sequences", type=int, default=384, metavar="N", help="to read, spread over the text")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="as in fedbert-ds eval")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of each; medians count")
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and measure."""
    bench_evaluation(typed(EvaluationOptions, build_parser().parse_args(arguments), PROGRAM))


if __name__ == "__main__":
    main()
